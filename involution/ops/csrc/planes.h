// Gradient of the kernels. A tap's gradient is a dot product over the channels of a group; with channels in the lanes of
// a register each would end in a sum across lanes. So the input rows in use are transposed first (once each, into a ring
// of planes, one a channel): then the lanes are the K neighbouring taps of one window row, side by side as in the result,
// and one multiply-add a channel does all of them.
#pragma once
#include "driver.h"

// [N][N] transposed in registers: log2 N rounds that exchange blocks of H lanes.
template <class A, int N, size_t... L>
INLINE void exchange(Vec<A, N>& a, Vec<A, N>& b, int h, std::index_sequence<L...>) {
    typedef typename IndexOf<A>::type I;
    typedef Vec<I, N> M;
    const M low = {I((int(L) & h) ? int(L) - h + N : int(L))...}, high = {I((int(L) & h) ? int(L) + N : int(L) + h)...};
    const Vec<A, N> first = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = first;
}

template <class A, int H, int N = kLanes<A>>
INLINE void transpose(Vec<A, N>* v) {
    unroll<N>([&](auto i) INLINED {
        if constexpr ((i & H) == 0) exchange<A, N>(v[i], v[i + H], H, std::make_index_sequence<N>{});
    });
    if constexpr (H > 1) transpose<A, H / 2>(v);
}

// The lanes from S on come first.
template <class A, int N, int S, size_t... L>
INLINE Vec<A, N> shift_down(Vec<A, N> v, std::index_sequence<L...>) {
    typedef typename IndexOf<A>::type I;
    const Vec<I, N> lanes = {I((L + S) % N)...};
    return S ? __builtin_shuffle(v, lanes) : v;
}

// Puts N lanes of `b`, from BASE on, into the Rth block of N lanes of `a`. For R = 1 block 0 becomes the lanes of `a` from
// BASE on as well; for a later R the blocks before it stay.
template <class A, int N, int W, int R, int BASE, size_t... L>
INLINE Vec<A, W> put_block(Vec<A, W> a, Vec<A, W> b, std::index_sequence<L...>) {
    typedef typename IndexOf<A>::type I;
    const Vec<I, W> lanes = {I(int(L) / N == R ? W + BASE + int(L) % N : R == 1 ? (BASE + int(L) % N) % W : int(L))...};
    return __builtin_shuffle(a, b, lanes);
}

template <class A, class T>
class Planes {
public:
    // Room for the rows that one tile of `tile_rows` output rows sees, of the channels of the unit.
    Planes(const Problem& p, const Unit& unit, int64_t tile_rows, const T* image)
        : p_(p), image_(image), first_(unit.group * p.group_channels()), count_(unit.groups() * p.group_channels()) {
        ring_ = (tile_rows - 1) * p.stride + (p.size - 1) * p.dilation + 1;
        phase_ = (p.width + 2 * p.padding + p.dilation - 1) / p.dilation;
        row_ = phase_ * p.dilation;
        // where registers are transposed: the last one of a row may stick out
        if (p.dilation == 1) row_ = std::max(row_, p.padding + (p.width + kLanes<A> - 1) / kLanes<A> * kLanes<A>);
        plane_ = row_ * (ring_ + 1) + 2 * kLanes<A>;  // a row of zeros, and what full registers read past the end
        data_ = scratch<A>(3, plane_ * count_);
        std::fill(data_, data_ + plane_ * count_, A(0));
        next_ = std::max<int64_t>(0, unit.row * p.stride - p.padding);
    }

    // Transposes the input rows that output rows before `last` need and that are not here yet.
    void advance(int64_t last) {
        const int64_t end = std::min(p_.height, (last - 1) * p_.stride - p_.padding + (p_.size - 1) * p_.dilation + 1);
        for (; next_ < end; ++next_) add_row(next_);
    }

    int64_t plane_step() const { return plane_; }
    // Plane of channel c of the unit, at the window of output column j.
    const A* window(int64_t c, int64_t j) const {
        const int64_t x = j * p_.stride;
        return data_ + c * plane_ + (p_.dilation == 1 ? x : x % p_.dilation * phase_ + x / p_.dilation);
    }
    // Offset of input row y in a plane; of the zeros where y is outside.
    int64_t row(int64_t y) const { return (uint64_t(y) < uint64_t(p_.height) ? y % ring_ : ring_) * row_; }

private:
    NOINLINE void add_row(int64_t y) {
        constexpr int L = kLanes<A>;
        typedef Vec<A> V;
        const T* from = image_ + y * p_.x_row + first_;
        A* to = data_ + y % ring_ * row_;
        const int64_t whole = p_.dilation == 1 ? count_ / L * L : 0;
        for (int64_t x = 0; x < p_.width; x += L)
            for (int64_t c = 0; c < whole; c += L) {
                V v[L];
                unroll<L>([&](auto i) INLINED {
                    v[i] = x + i < p_.width ? load<V>(from + (x + i) * p_.x_pixel + c) : V{};
                });
                transpose<A, L / 2>(v);
                unroll<L>([&](auto i) INLINED { store(to + (c + i) * plane_ + p_.padding + x, v[i]); });
            }
        for (int64_t at = 0; at < p_.width && whole < count_; ++at) {
            const int64_t column = at + p_.padding;
            A* place = to + column % p_.dilation * phase_ + column / p_.dilation;
            for (int64_t c = whole; c < count_; ++c) place[c * plane_] = load<A>(from + at * p_.x_pixel + c);
        }
    }

    const Problem& p_;
    const T* image_;
    int64_t first_, count_, ring_, phase_, row_, plane_, next_;
    A* data_;
};

// How window rows lie in registers: ROWS rows side by side, each in a block of LANES lanes of which K are in use. PIXELS
// pixels at a stride of S are done together; those whose windows start within SHARED lanes use the same register.
template <class A, int K, int S>
struct Taps {
    static constexpr int LANES = K <= 4 ? 4 : 8, SHARED = LANES - K + 1;
    static constexpr int ROWS = kLanes<A> > LANES ? kLanes<A> / LANES : 1, WIDTH = LANES * ROWS;
    static constexpr int REGISTERS = (K + ROWS - 1) / ROWS;
    static constexpr int PIXELS = ROWS == 1 ? (S == 1 ? SHARED : 1) : REGISTERS == 1 && S == 1 ? 8 : 4;
    static constexpr int base(int pixel) { return pixel * S / SHARED * SHARED; }
    static_assert(ROWS == 1 ? base(PIXELS - 1) == 0 : base(PIXELS - 1) + LANES <= WIDTH);
};

// out[u * K + v] = sum_c grad[c] * plane_c[rows[u] + v], K a constant, for P neighbouring pixels.
template <class A, int K, int S, int P>
INLINE void window_gradient(int64_t channels, const A* __restrict x, int64_t plane, const int64_t* __restrict rows,
                            const A* __restrict grad, int64_t grad_step, A* __restrict out, int64_t out_step) {
    typedef Taps<A, K, S> T;
    constexpr int W = T::WIDTH, R = T::ROWS;
    typedef Vec<A, W> V;
    typedef std::make_index_sequence<W> Lanes;
    V sum[P][T::REGISTERS];
    unroll<P * T::REGISTERS>([&](auto i) INLINED { sum[i / T::REGISTERS][i % T::REGISTERS] = V{}; });
    for (int64_t c = 0; c < channels; ++c, x += plane) {
        V value[P];
        unroll<P>([&](auto p) INLINED { value[p] = grad[p * grad_step + c] - V{}; });
        unroll<T::REGISTERS>([&](auto q) INLINED {
            V inputs[R];
            unroll<R>([&](auto r) INLINED {
                inputs[r] = load<V>(x + rows[q * R + r < K ? q * R + r : 0]);
                in_register(inputs[r]);
            });
            unroll<P>([&](auto p) INLINED {
                V windows = inputs[0];
                unroll<R - 1>([&](auto r) INLINED {
                    if constexpr (r == 0 || q * R + r + 1 < K)
                        windows = put_block<A, T::LANES, W, r + 1, T::base(p)>(windows, inputs[r + 1], Lanes{});
                });
                sum[p][q] += value[p] * windows;
            });
        });
    }
    // A register is wider than a row of taps: the next rows' stores correct what this one spilled.
    unroll<P * K>([&](auto i) INLINED {
        constexpr int p = i / K, u = i % K, room = K * (K - u);
        const V row = shift_down<A, W, u % R * T::LANES + p * S - T::base(p)>(sum[p][u / R], Lanes{});
        A* to = out + p * out_step + u * K;
        if constexpr (W <= room)
            store(to, row);
        else
            __builtin_memcpy(to, &row, (T::LANES <= room ? T::LANES : K) * sizeof(A));
    });
}

// The same for any K, a register of taps at a time.
template <class A>
INLINE void window_gradient(int64_t size, int64_t channels, const A* __restrict x, int64_t plane,
                            const int64_t* __restrict rows, const A* __restrict grad, A* __restrict out) {
    constexpr int N = 16 / int(sizeof(A));
    typedef Vec<A, N> V;
    for (int64_t u = 0; u < size; ++u)
        for (int64_t v = 0; v < size; v += N) {
            V sum = {};
            for (int64_t c = 0; c < channels; ++c) sum += grad[c] * load<V>(x + c * plane + rows[u] + v);
            for (int64_t n = 0; n < std::min<int64_t>(N, size - v); ++n) out[u * size + v + n] = sum[n];
        }
}

// Gradients of the kernels of one tile. grad: image of the output gradient, dense channels_last.
template <int K, int S, class A, class T>
NOINLINE void tile_grad_kernel(const Problem& p, const Unit& unit, const Tile<A>& tile, Planes<A, T>& planes,
                               const T* grad) {
    const int64_t width = p.group_channels(), columns = tile.last_column - tile.column;
    constexpr bool in_place = std::is_same_v<A, T>;
    const int64_t step = in_place ? p.channels : width;  // of the pixels of a group's gradients
    int64_t* rows = scratch<int64_t>(0, p.size);
    planes.advance(tile.last_row);
    for (int64_t i = tile.row; i < tile.last_row; ++i) {
        for (int64_t u = 0; u < p.size; ++u) rows[u] = planes.row(i * p.stride - p.padding + u * p.dilation);
        // Groups outside: the planes of one group fit the first-level cache, those of all do not.
        for (int64_t g = 0; g < unit.groups(); ++g) {
            const T* grads = grad + (i * p.out_width + tile.column) * p.channels + (unit.group + g) * width;
            const A* from;
            if constexpr (in_place) {
                from = grads;
            } else {
                A* wide = scratch<A>(10, columns * width);
                for (int64_t j = 0; j < columns; ++j) convert<A>(grads + j * p.channels, width, wide + j * width);
                from = wide;
            }
            from -= tile.column * step;
            A* out = tile.values + (i - tile.row) * tile.row_step - tile.column * tile.pixel_step + g * p.taps();
            auto at = [&](auto pixels, int64_t j) INLINED {
                const A* x = planes.window(g * width, j);
                if constexpr (K > 0)
                    window_gradient<A, K, S, decltype(pixels)::value>(width, x, planes.plane_step(), rows,
                                                                   from + j * step, step,
                                                                   out + j * tile.pixel_step, tile.pixel_step);
                else
                    window_gradient<A>(p.size, width, x, planes.plane_step(), rows, from + j * step,
                                       out + j * tile.pixel_step);
            };
            int64_t j = tile.column;
            if constexpr (K > 0) {
                constexpr int P = Taps<A, K, S>::PIXELS;
                if (p.stride == S && p.dilation == 1) {
                    for (; P > 1 && j + P <= tile.last_column; j += P) at(Count<P>{}, j);
                    for (; P > 3 && j + 3 <= tile.last_column; j += 3) at(Count<3>{}, j);
                    for (; P > 2 && j + 2 <= tile.last_column; j += 2) at(Count<2>{}, j);
                }
            }
            for (; j < tile.last_column; ++j) at(Count<1>{}, j);
        }
    }
}

template <class A, class T>
void tile_grad_kernel(const Problem& p, const Unit& unit, const Tile<A>& tile, Planes<A, T>& planes, const T* grad) {
    if (p.size == 7 && p.stride == 2) return tile_grad_kernel<7, 2>(p, unit, tile, planes, grad);
    if (p.size == 7) return tile_grad_kernel<7, 1>(p, unit, tile, planes, grad);
    if (p.size == 5) return tile_grad_kernel<5, 1>(p, unit, tile, planes, grad);
    if (p.size == 3) return tile_grad_kernel<3, 1>(p, unit, tile, planes, grad);
    tile_grad_kernel<0, 1>(p, unit, tile, planes, grad);
}
