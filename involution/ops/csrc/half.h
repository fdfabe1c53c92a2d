// bfloat16 in memory: computed with as float, rounded to the nearest (ties to even) where it is stored, NaN kept.
#pragma once
#include <type_traits>

#include "vector.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

struct Half {
    uint16_t bits;
};

template <class T>
struct WideOf {
    typedef T type;
};
template <>
struct WideOf<Half> {
    typedef float type;
};
template <class T>
using Wide = typename WideOf<T>::type;  // what a stored type is computed with

// What matrices are multiplied as: bfloat16 where the machine does, else what it is computed with.
#if defined(__AVX512BF16__)
template <class T>
using Factor = T;
#else
template <class T>
using Factor = Wide<T>;
#endif

// The bits of N values, each in the lower half of a lane.
template <int N>
INLINE Vec<uint32_t, N> half_bits(const Half* p) {
    if constexpr (N == 1) return p->bits;
#if defined(__AVX2__)  // what the general form takes four instructions for
    if constexpr (N == 8) return Vec<uint32_t, N>(_mm256_cvtepu16_epi32(load<__m128i>(&p->bits)));
#endif
#if defined(__AVX512F__)
    if constexpr (N == 16) return Vec<uint32_t, N>(_mm512_cvtepu16_epi32(load<__m256i>(&p->bits)));
#endif
    if constexpr (N > 1)
        return __builtin_convertvector(load<Vec<uint16_t, N>>(&p->bits), Vec<uint32_t, N>);
}

template <class V>
INLINE V load(const Half* p) {
    const auto bits = half_bits<sizeof(V) / sizeof(float)>(p) << 16;
    V v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
}

template <class V>
INLINE void store(Half* p, V v) {
    constexpr int N = sizeof(V) / sizeof(float);
    typedef Vec<uint16_t, N> Bits;
#if defined(__AVX512BF16__)
    if constexpr (N == 16) return store(&p->bits, Bits(_mm512_cvtneps_pbh(__m512(v))));
    if constexpr (N == 8) return store(&p->bits, Bits(_mm256_cvtneps_pbh(__m256(v))));
#endif
    Vec<uint32_t, N> bits;
    __builtin_memcpy(&bits, &v, sizeof v);
    bits = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : Vec<uint32_t, N>{} + 0x7fc0;
    if constexpr (N == 1)
        p->bits = uint16_t(bits);
    else
        store(&p->bits, __builtin_convertvector(bits, Bits));
}

struct Store {
    template <class T, class V>
    INLINE void operator()(T* to, V value) const {
        store(to, value);
    }
};

// Past the caches, where the processor can: for what is larger than they are. `p` has the alignment of what is written.
template <class V, class T>
INLINE void store_past_caches(T* p, V v) {
#if defined(__AVX512F__)
    T values[sizeof v / sizeof(Wide<T>)];
    store(values, v);
    __m512i wide;
    __m256i half;
    if constexpr (sizeof values == sizeof wide) {
        __builtin_memcpy(&wide, values, sizeof wide);
        return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), wide);
    } else if constexpr (sizeof values == sizeof half) {
        __builtin_memcpy(&half, values, sizeof half);
        return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half);
    }
#endif
    store(p, v);
}

// Behind stores past the caches, before others read what they wrote.
inline void finish_stores() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// to[i] = from[i], in another type
template <class A, class S, class T>
INLINE void convert(const S* from, int64_t n, T* to) {
    each_register<A>(0, n, [&](auto lanes, int64_t i) INLINED {
        store(to + i, load<Vec<A, decltype(lanes)::value>>(from + i));
    });
}
