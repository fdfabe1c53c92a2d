// Vectors of any width in GCC's vector extensions: one source becomes AVX-512, AVX2, SSE or NEON by compiler flags.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // one copy of what is big: it keeps the build short

template <class A>
constexpr int kLanes = kRegisterBytes / int(sizeof(A));

template <class A, int N>
struct VecOf {
    typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <class A>
struct VecOf<A, 1> {
    typedef A type;
};
template <class A, int N = kLanes<A>>
using Vec = typename VecOf<A, N>::type;

// Unaligned and free of aliasing rules, as memcpy is, but always one instruction.
template <class V, class A>
INLINE V load(const A* p) {
    typedef V U __attribute__((aligned(sizeof(A)), may_alias));
    return *reinterpret_cast<const U*>(p);
}
template <class V, class A>
INLINE void store(A* p, V v) {
    typedef V U __attribute__((aligned(sizeof(A)), may_alias));
    *reinterpret_cast<U*>(p) = v;
}

// unroll<N>(f): f(0) ... f(N-1) with constant indices, so that arrays of accumulators live in registers.
template <class F, size_t... I>
INLINE void unroll_impl(F&& f, std::index_sequence<I...>) {
    (f(std::integral_constant<int, int(I)>{}), ...);
}
template <int N, class F>
INLINE void unroll(F&& f) {
    unroll_impl(f, std::make_index_sequence<N>{});
}

template <class A>
struct IndexOf;
template <>
struct IndexOf<float> {
    typedef int32_t type;
};
template <>
struct IndexOf<double> {
    typedef int64_t type;
};

// One level of the transpose-and-add tree. a and b each hold H sums, leaf-major, spread over N/H lanes; the result holds
// the 2H sums of both, spread over half as many lanes.
template <class A, int N, int H, size_t... L>
INLINE Vec<A, N> fold_pair(Vec<A, N> a, Vec<A, N> b, std::index_sequence<L...>) {
    typedef typename IndexOf<A>::type I;
    typedef Vec<I, N> M;
    constexpr int half = N / (2 * H);
    const M low = {I((int(L) / half) * 2 * half + int(L) % half)...};
    const M high = low + half;
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Sums of N vectors of N lanes each: lane i of the result is the sum of all lanes of v[i]. Overwrites v.
template <class A, int N>
INLINE Vec<A, N> sum_each(Vec<A, N>* v) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        auto level = [&](auto self, auto h) {
            constexpr int H = decltype(h)::value;
            unroll<N / (2 * H)>([&](auto i) {
                v[i] = fold_pair<A, N, H>(v[2 * i], v[2 * i + 1], std::make_index_sequence<N>{});
            });
            if constexpr (2 * H < N) self(self, std::integral_constant<int, 2 * H>{});
        };
        level(level, std::integral_constant<int, 1>{});
        return v[0];
    }
}

template <class A, int N>
INLINE A sum_lanes(Vec<A, N> v) {
    if constexpr (N == 1) {
        return v;
    } else {
        Vec<A, N / 2> low, high;
        __builtin_memcpy(&low, &v, sizeof low);
        __builtin_memcpy(&high, reinterpret_cast<char*>(&v) + sizeof low, sizeof high);
        return sum_lanes<A, N / 2>(low + high);
    }
}
