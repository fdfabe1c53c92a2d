// The sliding window, forward and gradient of the input, tile by tile.
//
// The rows of the input (or of its gradient) that a tile sees lie in a ring, in blocks of one register of channels,
// [row][block][column][lanes], with the columns of the padding: windows of neighbouring pixels are at constant distances
// from one pointer, nothing branches at the borders, and rows of 512 channels do not fall into the same few places of
// the first-level cache. With P pixels at once each input that has been loaded serves up to K multiply-adds.
#pragma once
#include "driver.h"

// f(K, S) with the constants of the unrolled loops; false where they do not fit.
template <class A, class F>
bool with_window(const Problem& p, F f) {
    if constexpr (sizeof(A) == 4) {
        if (p.dilation != 1 || p.group_channels() % kLanes<A> != 0) return false;
        if (p.size == 7 && p.stride == 1) return f(Count<7>{}, Count<1>{}), true;
        if (p.size == 7 && p.stride == 2) return f(Count<7>{}, Count<2>{}), true;
        if (p.size == 5 && p.stride == 1) return f(Count<5>{}, Count<1>{}), true;
        if (p.size == 3 && p.stride == 1) return f(Count<3>{}, Count<1>{}), true;
    }
    return false;
}

template <class A>
class Ring {
public:
    // Room for the input rows that `tile_rows` output rows see, of the channels of the unit.
    Ring(const Problem& problem, const Unit& unit, int64_t tile_rows)
        : p(problem), ringed(with_window<A>(problem, [](auto, auto) {})),
          next_(std::max<int64_t>(0, unit.row * p.stride - p.padding)), first_(unit.group * p.group_channels()),
          count_(unit.groups() * p.group_channels()), size_((tile_rows - 1) * p.stride + p.size),
          block_((p.width + 2 * p.padding) * kLanes<A>), row_(block_ * (count_ / kLanes<A>)),
          data_(ringed ? scratch<A>(1, size_ * row_) : nullptr) {}

    const Problem& p;
    const bool ringed;

    // What the window of output column j sees of the first block, in the row that row() adds.
    A* window(int64_t j) const { return data_ + j * p.stride * kLanes<A>; }
    int64_t row(int64_t y) const { return y % size_ * row_; }
    int64_t block_step() const { return block_; }

protected:
    // One past the last input row that output rows before `last` see.
    int64_t end(int64_t last) const {
        return std::min(p.height, (last - 1) * p.stride - p.padding + (p.size - 1) * p.dilation + 1);
    }
    // move(place in the ring, offset in the image): a register of row y, [y][width][channels] with these steps
    template <class F>
    void each_register_of(int64_t y, int64_t row_step, int64_t pixel_step, F move) const {
        A* place = data_ + row(y) + p.padding * kLanes<A>;
        int64_t at = y * row_step + first_;
        for (int64_t x = 0; x < p.width; ++x, place += kLanes<A>, at += pixel_step)
            for (int64_t c = 0; c < count_; c += kLanes<A>) move(place + c / kLanes<A> * block_, at + c);
    }

    int64_t next_;  // the first input row that has not been here
    int64_t first_, count_, size_, block_, row_;  // first channel and their number; rows; steps of blocks and rows
    A* data_;
};

template <class A, class T>
class InputRows : public Ring<A> {
public:
    const T* const image;

    InputRows(const Problem& p, const Unit& unit, int64_t tile_rows, const T* from)
        : Ring<A>(p, unit, tile_rows), image(from) {
        if (!this->ringed) return;
        const int64_t border = p.padding * kLanes<A>, blocks = this->size_ * (this->row_ / this->block_);
        for (A* to = this->data_; to < this->data_ + blocks * this->block_; to += this->block_) {
            std::fill_n(to, border, A(0));
            std::fill_n(to + this->block_ - border, border, A(0));
        }
    }
    // Brings the rows that output rows before `last` see.
    void advance(int64_t last) {
        for (const int64_t end = this->end(last); this->next_ < end; ++this->next_)
            this->each_register_of(this->next_, this->p.x_row, this->p.x_pixel, [&](A* to, int64_t at) INLINED {
                store(to, load<Vec<A>>(image + at));
            });
    }
};

template <class A, class T>
class GradientRows : public Ring<A> {
public:
    T* const image;  // of the gradient, dense channels_last; the part of the unit's channels becomes complete
    A* sums = nullptr;  // where nothing is ringed: the image itself, or one of the type that is added up in

    GradientRows(const Problem& p, const Unit& unit, int64_t tile_rows, T* to)
        : Ring<A>(p, unit, tile_rows), image(to) {
        if (this->ringed) return;
        if constexpr (std::is_same_v<A, T>)
            sums = image;
        else
            sums = scratch<A>(5, p.height * p.width * p.channels);
    }

    // Sets the rows to zero that output rows first...last add to and none did before. Only now: the cache has them then.
    void advance(int64_t first, int64_t last) {
        write(std::min(this->next_, first * this->p.stride - this->p.padding));
        for (const int64_t end = this->end(last); this->next_ < end; ++this->next_) {
            if (this->ringed)
                std::fill_n(this->data_ + this->row(this->next_), this->row_, A(0));
            else
                clear(this->next_);
        }
    }
    void finish() {
        write(this->next_);
        for (; this->next_ < this->p.height; ++this->next_) clear(this->next_);
        if (!std::is_same_v<A, T> && !this->ringed)
            for (int64_t y = 0; y < this->p.height; ++y)
                each_pixel(y, [&](int64_t at) { convert<A>(sums + at, this->count_, image + at); });
    }

private:
    void write(int64_t end) {
        const int64_t step = this->p.channels;
        for (; this->ringed && written_ < end; ++written_)
            this->each_register_of(written_, this->p.width * step, step, [&](A* from, int64_t at) INLINED {
                store(image + at, load<Vec<A>>(from));
            });
    }
    void clear(int64_t y) {
        each_pixel(y, [&](int64_t at) {
            if (sums) return void(std::fill_n(sums + at, this->count_, A(0)));
            std::fill_n(image + at, this->count_, T{});
        });
    }
    // f(offset of the unit's channels) for the pixels of row y
    template <class F>
    void each_pixel(int64_t y, F f) const {
        int64_t at = y * this->p.width * this->p.channels + this->first_;
        for (int64_t x = 0; x < this->p.width; ++x, at += this->p.channels) f(at);
    }

    int64_t written_ = 0;
};

// Cuts a row into strips of 8, 7, 4, 2 or 1 pixels: 7 because the feature maps of a ResNet are multiples of 7.
template <class F>
INLINE void each_strip(int64_t column, int64_t last, F f) {
    for (int64_t n; (n = last - column) > 0;) {
        const int64_t take = n % 7 == 0 ? 7 : n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
        if (take == 8) f(Count<8>{}, column);
        if (take == 7) f(Count<7>{}, column);
        if (take == 4) f(Count<4>{}, column);
        if (take == 2) f(Count<2>{}, column);
        if (take == 1) f(Count<1>{}, column);
        column += take;
    }
}

// P neighbouring pixels of one row and one register of channels.
template <class A, int P>
struct Strip {
    static constexpr int pixels = P;
    A* x;             // what the first pixel's window sees, but for the row
    const A* kernel;  // of the first pixel, the others in steps of a tile's pixels
    int64_t channel;
    int64_t at;       // of the first pixel and this channel in a dense image
};

// The rows of the windows of one output row that are inside the image, and what they add to Strip::x.
template <int K>
struct WindowRows {
    int64_t first, last, offset[K];
};

// f(strip, rows) for all strips of a tile.
template <int K, class A, class F>
INLINE void each_window(const Unit& unit, const Tile<A>& tile, const Ring<A>& ring, F f) {
    const Problem& p = ring.p;
    const int64_t width = p.group_channels();
    for (int64_t i = tile.row; i < tile.last_row; ++i) {
        WindowRows<K> rows;
        inside_rows(p.window(), i, rows.first, rows.last);
        for (int64_t u = rows.first; u < rows.last; ++u) rows.offset[u] = ring.row(i * p.stride - p.padding + u);
        each_strip(tile.column, tile.last_column, [&](auto pixels, int64_t j) INLINED {
            const A* kernel = tile.values + (i - tile.row) * tile.row_step + (j - tile.column) * tile.pixel_step;
            A* x = ring.window(j);
            int64_t channel = unit.group * width;
            for (int64_t g = unit.group; g < unit.last_group; ++g, kernel += p.taps())
                for (const int64_t end = (g + 1) * width; channel < end; channel += kLanes<A>, x += ring.block_step())
                    f(Strip<A, decltype(pixels)::value>{x, kernel, channel, (i * p.out_width + j) * p.channels + channel},
                      rows);
        });
    }
}

// One pointer a pixel, opaque to the compiler: it would keep an address for every tap instead, more than it has registers.
template <int P, class A>
INLINE void pixel_taps(const A* kernel, int64_t step, const A** out) {
    unroll<P>([&](auto p) INLINED {
        out[p] = kernel + p * step;
        asm("" : "+r"(out[p]));
    });
}

template <int K, int S, class A, class T>
NOINLINE void ring_forward(const Unit& unit, const Tile<A>& tile, const InputRows<A, T>& rows, T* out,
                           Finish<A> finish) {
    const int64_t step = tile.pixel_step, channels = rows.p.channels;
    each_window<K>(unit, tile, rows, [&](auto strip, const WindowRows<K>& inside) INLINED {
        constexpr int P = decltype(strip)::pixels;
        Vec<A> sum[P] = {};
        for (int64_t u = inside.first; u < inside.last; ++u) {
            const A *taps[P], *x = strip.x + inside.offset[u];
            pixel_taps<P>(strip.kernel + u * K, step, taps);
            unroll<(P - 1) * S + K>([&](auto i) INLINED {
                const Vec<A> value = load<Vec<A>>(x + i * kLanes<A>);
                unroll<P>([&](auto p) INLINED {
                    constexpr int v = i - p * S;
                    if constexpr (v >= 0 && v < K) sum[p] += taps[p][v] * value;
                });
            });
        }
        finish.template apply<P>(strip.channel, sum);
        unroll<P>([&](auto p) INLINED { store(out + strip.at + p * channels, sum[p]); });
    });
}

// The same loads, each input position kept in a register while its taps are added.
template <int K, int S, class A, class T>
NOINLINE void ring_grad_input(const Unit& unit, const Tile<A>& tile, const GradientRows<A, T>& rows, const T* grad) {
    const int64_t step = tile.pixel_step, channels = rows.p.channels;
    each_window<K>(unit, tile, rows, [&](auto strip, const WindowRows<K>& inside) INLINED {
        constexpr int P = decltype(strip)::pixels;
        Vec<A> value[P];
        unroll<P>([&](auto p) INLINED {
            value[p] = load<Vec<A>>(grad + strip.at + p * channels);
            __builtin_prefetch(grad + strip.at + (P + p) * channels);  // everything below waits for these loads
        });
        for (int64_t u = inside.first; u < inside.last; ++u) {
            const A* taps[P];
            A* x = strip.x + inside.offset[u];
            pixel_taps<P>(strip.kernel + u * K, step, taps);
            unroll<(P - 1) * S + K>([&](auto i) INLINED {
                Vec<A> sum = load<Vec<A>>(x + i * kLanes<A>);
                unroll<P>([&](auto p) INLINED {
                    constexpr int v = i - p * S;
                    if constexpr (v >= 0 && v < K) sum += taps[p][v] * value[p];
                });
                store(x + i * kLanes<A>, sum);
            });
        }
    });
}
