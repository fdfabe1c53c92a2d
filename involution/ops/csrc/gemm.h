// The small matrix products of the fused operator, on one register-blocked kernel.
//   kernels     [pixels][taps]   = reduced [pixels][R] x weight^T + bias
//   grad_reduced[pixels][R]      = grad_kernels [pixels][taps] x weight
//   grad_weight [taps][R]       += grad_kernels^T x reduced
// A block of 12 x 2 registers (6 x 2 where there are 16 registers) does 24 multiply-adds on 2 loads and 12 broadcasts.
// Of bfloat16 each multiply-add takes two factors a lane: the values of two neighbouring k of a row of A, and of two rows
// of B, side by side.
#pragma once
#include "driver.h"

constexpr int kBlockRows = kRegisterBytes == 64 ? 12 : 6;

#if defined(__AVX512BF16__)
INLINE void add_products(Vec<float>& sum, Vec<uint32_t> a, Vec<uint32_t> b) {
    sum = _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
}
#endif

struct StorePositive {
    template <class C, class V>
    INLINE void operator()(C* to, V sum) const {
        store(to, positive(sum));
    }
};

// C[i][:] (+)= sum_k A[i * a_row + k * a_step] * B[k * b_step + :] for ROWS rows and COLS registers, stored by `done`.
// Of bfloat16 A[k + 1] follows A[k] in memory where k is even, whatever a_step is.
template <class A, int ROWS, int COLS, class F, class C, class Done>
INLINE void gemm_block(int64_t depth, const F* __restrict a, int64_t a_row, int64_t a_step, const F* __restrict b,
                       int64_t b_step, C* __restrict c, int64_t c_row, const A* __restrict bias, bool add, Done done) {
    typedef Vec<A> V;
    constexpr int L = kLanes<A>;
    V sum[ROWS][COLS];
    unroll<ROWS>([&](auto i) INLINED {
        unroll<COLS>([&](auto j) INLINED {
            sum[i][j] = add ? load<V>(c + i * c_row + j * L) : bias ? load<V>(bias + j * L) : V{};
        });
    });
    if constexpr (std::is_same_v<F, A>) {
        for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
            V column[COLS];
            unroll<COLS>([&](auto j) INLINED { column[j] = load<V>(b + j * L); });
            unroll<ROWS>([&](auto i) INLINED {
                const V value = a[i * a_row] - V{};
                unroll<COLS>([&](auto j) INLINED { sum[i][j] += value * column[j]; });
            });
        }
    } else {
        const auto add_pairs = [&](auto rows_of_b, auto bits_of_a) INLINED {
            Vec<uint32_t> column[COLS];
            unroll<COLS>([&](auto j) INLINED {
                column[j] = half_bits<L>(b + j * L);
                if constexpr (rows_of_b == 2) column[j] |= half_bits<L>(b + b_step + j * L) << 16;
            });
            unroll<ROWS>([&](auto i) INLINED {
                const Vec<uint32_t> value = bits_of_a(a + i * a_row) - Vec<uint32_t>{};
                unroll<COLS>([&](auto j) INLINED { add_products(sum[i][j], value, column[j]); });
            });
        };
        int64_t k = 0;
        for (; k + 2 <= depth; k += 2, a += 2 * a_step, b += 2 * b_step)
            add_pairs(std::integral_constant<int, 2>{}, [](const Half* p) INLINED {
                uint32_t bits;
                __builtin_memcpy(&bits, p, sizeof bits);
                return bits;
            });
        if (k < depth) add_pairs(std::integral_constant<int, 1>{}, [](const Half* p) INLINED { return uint32_t(p->bits); });
    }
    unroll<ROWS>([&](auto i) INLINED { unroll<COLS>([&](auto j) INLINED { done(c + i * c_row + j * L, sum[i][j]); }); });
}

template <class A, int COLS, int ROWS = kBlockRows, class F, class C, class Done>
INLINE void gemm_rows(int64_t rows, int64_t depth, const F* a, int64_t a_row, int64_t a_step, const F* b,
                      int64_t b_step, C* c, int64_t c_row, const A* bias, bool add, Done done) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_row, c += ROWS * c_row)
        gemm_block<A, ROWS, COLS>(depth, a, a_row, a_step, b, b_step, c, c_row, bias, add, done);
    if constexpr (ROWS > 1) {
        constexpr int next = ROWS > 8 ? 8 : ROWS > 4 ? 4 : ROWS / 2;
        gemm_rows<A, COLS, next>(rows, depth, a, a_row, a_step, b, b_step, c, c_row, bias, add, done);
    }
}

// All columns: `columns` is a multiple of the lanes. b_panel(column) points at B's first row from that column on.
template <class A, class F, class Panel, class C, class Done = Store>
NOINLINE void gemm(int64_t rows, int64_t columns, int64_t depth, const F* a, int64_t a_row, int64_t a_step,
                   Panel b_panel, int64_t b_step, C* c, int64_t c_row, const A* bias, bool add, Done done = {}) {
    constexpr int L = kLanes<A>;
    const auto run = [&](auto registers, int64_t j) INLINED {
        const A* addend = bias ? bias + j : nullptr;
        gemm_rows<A, registers>(rows, depth, a, a_row, a_step, b_panel(j), b_step, c + j, c_row, addend, add, done);
    };
    int64_t j = 0;
    for (; j + 2 * L <= columns; j += 2 * L) run(Count<2>{}, j);
    if (j < columns) run(Count<1>{}, j);
}

// The columns of `from` [rows][step] as the rows of an A.
template <class F>
struct Columns {
    const F* values;
    int64_t row, step;

    Columns(const F* from, int64_t from_step, int64_t rows, int64_t columns, int slot)
        : values(from), row(1), step(from_step) {
        if constexpr (std::is_same_v<F, Half>) {
            Half* pairs = scratch<Half>(slot, (rows + 1) / 2 * 2 * columns);
            values = pairs, row = 2, step = columns;
            for (int64_t k = 0; k < rows; k += 2, from += 2 * from_step, pairs += 2 * columns)
                each_register<float>(0, columns, [&](auto lanes, int64_t i) INLINED {
                    constexpr int N = decltype(lanes)::value;
                    Vec<uint32_t, N> bits = half_bits<N>(from + i);
                    if (k + 1 < rows) bits |= half_bits<N>(from + from_step + i) << 16;
                    __builtin_memcpy(pairs + 2 * i, &bits, sizeof bits);
                });
        }
    }
};
