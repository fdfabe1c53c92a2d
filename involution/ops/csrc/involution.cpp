// Entry points. Of the plain operator the kernel tensor is read (its gradient written) in place where its taps lie
// together in the type of the sums; else tile by tile through a converted copy.
#include <cstring>

#include "folded.h"
#include "norm.h"
#include "pointwise.h"

typedef uint16_t Half;  // bfloat16

INLINE float widen(float v) { return v; }
INLINE double widen(double v) { return v; }
INLINE float widen(Half v) {
    const uint32_t bits = uint32_t(v) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
INLINE void narrow(float v, float* to) { *to = v; }
INLINE void narrow(double v, double* to) { *to = v; }
INLINE void narrow(float v, Half* to) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    *to = Half(v != v ? 0x7fc0 : rounded);
}

// move(stored value, tile value) for the taps of every pixel of a tile, in blocks that suit both layouts.
template <class T, class A, class F>
void each_value(const Problem& p, const Unit& unit, const Tile<A>& tile, T* image, F move) {
    const int64_t taps = unit.groups() * p.taps(), columns = tile.last_column - tile.column;
    for (int64_t i = tile.row; i < tile.last_row; ++i) {
        T* row = image + i * p.kernel_row + tile.column * p.kernel_pixel + unit.group * p.taps() * p.kernel_tap;
        A* to = tile.values + (i - tile.row) * tile.row_step;
        if (p.kernel_tap == 1) {
            for (int64_t j = 0; j < columns; ++j)
                for (int64_t t = 0; t < taps; ++t) move(row[j * p.kernel_pixel + t], to[j * tile.pixel_step + t]);
            continue;
        }
        for (int64_t t0 = 0; t0 < taps; t0 += 16)
            for (int64_t j = 0; j < columns; ++j)
                for (int64_t t = t0; t < std::min(t0 + 16, taps); ++t)
                    move(row[j * p.kernel_pixel + t * p.kernel_tap], to[j * tile.pixel_step + t]);
    }
}

// The tile in place, or, where that cannot be, room for a copy of it.
template <class A, class T>
Tile<A> place_tile(const Problem& p, const Unit& unit, Tile<A> tile, T* image) {
    if constexpr (sizeof(T) == sizeof(A)) {
        if (p.kernel_tap == 1) {
            tile.values = reinterpret_cast<A*>(const_cast<std::remove_const_t<T>*>(image)) + tile.row * p.kernel_row +
                          tile.column * p.kernel_pixel + unit.group * p.taps();
            tile.row_step = p.kernel_row, tile.pixel_step = p.kernel_pixel;
            return tile;
        }
    }
    tile.pixel_step = unit.groups() * p.taps();
    tile.row_step = tile.pixel_step * (tile.last_column - tile.column);
    tile.values = scratch<A>(2, tile.row_step * (tile.last_row - tile.row));
    return tile;
}

template <class A, class T>
bool in_place(const Problem& p) {
    return sizeof(T) == sizeof(A) && p.kernel_tap == 1;
}

template <class A, class T>
void forward(const Problem& p, const A* x, const T* kernel, A* out) {
    const Division division(p, true);
    on_threads(std::min(p.threads, division.units(p)), [&](int thread, int threads) {
        each_of(division.units(p), thread, threads, [&](int64_t n) {
            const Unit unit = division.unit(p, n);
            const Tiling<A> tiling(p, unit);
            InputRows<A> rows(p, unit, tiling.rows, x + unit.image * p.x_batch);
            tiling.each(p, unit, [&](Tile<A> tile) {
                const T* from = kernel + unit.image * p.kernel_batch;
                tile = place_tile<A>(p, unit, tile, from);
                if (!in_place<A, T>(p)) each_value(p, unit, tile, from, [](T v, A& w) { w = widen(v); });
                tile_forward(unit, tile, rows, out + unit.image * p.out_height * p.out_width * p.channels);
            });
        });
    });
}

template <class A, class T>
void backward(const Problem& p, const A* grad, const A* x, const T* kernel, A* grad_x, T* grad_kernel) {
    const Division division(p, false);
    on_threads(std::min(p.threads, division.units(p)), [&](int thread, int threads) {
        each_of(division.units(p), thread, threads, [&](int64_t n) {
            const Unit unit = division.unit(p, n);
            const Tiling<A> tiling(p, unit);
            const T* from = kernel + unit.image * p.kernel_batch;
            const A* grads = grad + unit.image * p.out_height * p.out_width * p.channels;
            if (grad_x) {
                GradientRows<A> rows(p, unit, tiling.rows, grad_x + unit.image * p.height * p.width * p.channels);
                tiling.each(p, unit, [&](Tile<A> tile) {
                    tile = place_tile<A>(p, unit, tile, from);
                    if (!in_place<A, T>(p)) each_value(p, unit, tile, from, [](T v, A& w) { w = widen(v); });
                    tile_grad_input(unit, tile, rows, grads);
                });
                rows.finish();
            }
            if (grad_kernel) {
                T* to = grad_kernel + unit.image * p.kernel_batch;
                Planes<A> planes(p, unit, tiling.rows, x + unit.image * p.x_batch);
                tiling.each(p, unit, [&](Tile<A> tile) {
                    tile = place_tile<A>(p, unit, tile, to);
                    tile_grad_kernel(p, unit, tile, planes, grads);
                    if (!in_place<A, T>(p)) each_value(p, unit, tile, to, [](T& v, A w) { narrow(w, &v); });
                });
            }
        });
    });
}

extern "C" {
// x, out, grad, grad_x: float (or double); kernel, grad_kernel: the same, or bfloat16 where p->half. grad_x and
// grad_kernel may be null. The kernel and its gradient have the same strides.
void involution_forward_float(const Problem* p, const float* x, const void* kernel, float* out) {
    if (p->half)
        forward(*p, x, static_cast<const Half*>(kernel), out);
    else
        forward(*p, x, static_cast<const float*>(kernel), out);
}
void involution_forward_double(const Problem* p, const double* x, const void* kernel, double* out) {
    forward(*p, x, static_cast<const double*>(kernel), out);
}
void involution_backward_float(const Problem* p, const float* grad, const float* x, const void* kernel, float* grad_x,
                               void* grad_kernel) {
    if (p->half)
        backward(*p, grad, x, static_cast<const Half*>(kernel), grad_x, static_cast<Half*>(grad_kernel));
    else
        backward(*p, grad, x, static_cast<const float*>(kernel), grad_x, static_cast<float*>(grad_kernel));
}
void involution_backward_double(const Problem* p, const double* grad, const double* x, const void* kernel,
                                double* grad_x, void* grad_kernel) {
    backward(*p, grad, x, static_cast<const double*>(kernel), grad_x, static_cast<double*>(grad_kernel));
}

// Copies of grad_reduced that involution_span_backward_* fills.
int64_t involution_chunks(const Problem* p) { return Division(*p, false).chunks; }

#define SPAN(NAME, A)                                                                                                 \
    void involution_span_forward_##NAME(const Problem* p, const A* x, const A* reduced, const A* weight,              \
                                        const A* bias, A* out) {                                                      \
        span_forward(*p, x, reduced, weight, bias, out);                                                              \
    }                                                                                                                 \
    void involution_span_backward_##NAME(const Problem* p, const A* grad, const A* x, const A* reduced,               \
                                         const A* weight, const A* bias, A* grad_x, A* grad_reduced, A* grad_weight,  \
                                         A* grad_bias) {                                                              \
        span_backward(*p, grad, x, reduced, weight, bias, grad_x, grad_reduced, grad_weight, grad_bias);              \
    }                                                                                                                 \
    void involution_folded_forward_##NAME(const Problem* p, const A* x, const A* packed, A* out) {                    \
        folded_forward(*p, x, packed, out);                                                                           \
    }
SPAN(float, float)
SPAN(double, double)

#define TRAINING(NAME, A)                                                                                             \
    void involution_norm_forward_##NAME(const Norm* n, const A* x, const A* skip, const A* weight, const A* bias,     \
                                        A* running_mean, A* running_var, A* coefficients, A* out) {                   \
        norm_forward(*n, x, skip, weight, bias, running_mean, running_var, coefficients, out);                        \
    }                                                                                                                 \
    void involution_norm_apply_##NAME(const Norm* n, const A* x, A* coefficients, A* out) {                           \
        norm_apply<A>(*n, x, nullptr, coefficients, out);                                                             \
    }                                                                                                                 \
    void involution_norm_backward_##NAME(const Norm* n, const A* grad, const A* x, const A* out, A* coefficients,     \
                                         A* grad_x, A* grad_skip, A* grad_weight, A* grad_bias) {                     \
        norm_backward(*n, grad, x, out, coefficients, grad_x, grad_skip, grad_weight, grad_bias);                     \
    }                                                                                                                 \
    void involution_pointwise_backward_##NAME(const Pointwise* p, const A* grad, const A* x, const A* weight,         \
                                              A* grad_x, A* grad_weight) {                                            \
        pointwise_backward(*p, grad, x, weight, grad_x, grad_weight);                                                 \
    }
TRAINING(float, float)
TRAINING(double, double)
}
