// The three small matrix products of the fused operator, on one register-blocked kernel.
//   kernels     [pixels][taps]   = reduced [pixels][R] x weight^T + bias
//   grad_reduced[pixels][R]      = grad_kernels [pixels][taps] x weight
//   grad_weight [taps][R]       += grad_kernels^T x reduced
// A block of 12 x 2 registers (6 x 2 where there are 16 registers) does 24 multiply-adds on 2 loads and 12 broadcasts.
#pragma once
#include "vector.h"

constexpr int kBlockRows = kRegisterBytes == 64 ? 12 : 6;

// C[i][:] (+)= sum_k A[i * a_row + k * a_step] * B[k * b_step + :] for ROWS rows and COLS registers.
template <class A, int ROWS, int COLS>
INLINE void gemm_block(int64_t depth, const A* __restrict a, int64_t a_row, int64_t a_step, const A* __restrict b,
                       int64_t b_step, A* __restrict c, int64_t c_row, const A* __restrict bias, bool add) {
    typedef Vec<A> V;
    constexpr int L = kLanes<A>;
    V sum[ROWS][COLS];
    unroll<ROWS>([&](auto i) INLINED {
        unroll<COLS>([&](auto j) INLINED {
            sum[i][j] = add ? load<V>(c + i * c_row + j * L) : bias ? load<V>(bias + j * L) : V{};
        });
    });
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
        V column[COLS];
        unroll<COLS>([&](auto j) INLINED { column[j] = load<V>(b + j * L); });
        unroll<ROWS>([&](auto i) INLINED {
            const V value = a[i * a_row] - V{};
            unroll<COLS>([&](auto j) INLINED { sum[i][j] += value * column[j]; });
        });
    }
    unroll<ROWS>([&](auto i) INLINED { unroll<COLS>([&](auto j) INLINED { store(c + i * c_row + j * L, sum[i][j]); }); });
}

template <class A, int COLS, int ROWS = kBlockRows>
INLINE void gemm_rows(int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_step, const A* b,
                      int64_t b_step, A* c, int64_t c_row, const A* bias, bool add) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_row, c += ROWS * c_row)
        gemm_block<A, ROWS, COLS>(depth, a, a_row, a_step, b, b_step, c, c_row, bias, add);
    if constexpr (ROWS > 1) {
        constexpr int next = ROWS > 8 ? 8 : ROWS > 4 ? 4 : ROWS / 2;
        gemm_rows<A, COLS, next>(rows, depth, a, a_row, a_step, b, b_step, c, c_row, bias, add);
    }
}

// All columns: `columns` is a multiple of the lanes. b_panel(column) points at B's first row from that column on.
template <class A, class Panel>
NOINLINE void gemm(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row,
                                    int64_t a_step, Panel b_panel, int64_t b_step, A* c, int64_t c_row, const A* bias,
                                    bool add) {
    constexpr int L = kLanes<A>;
    int64_t j = 0;
    for (; j + 2 * L <= columns; j += 2 * L)
        gemm_rows<A, 2>(rows, depth, a, a_row, a_step, b_panel(j), b_step, c + j, c_row, bias ? bias + j : nullptr, add);
    if (j < columns)
        gemm_rows<A, 1>(rows, depth, a, a_row, a_step, b_panel(j), b_step, c + j, c_row, bias ? bias + j : nullptr, add);
}
