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
#define INLINED __attribute__((always_inline))  // on a lambda: inlined early enough for its captures to be registers
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

template <class V>
INLINE V positive(V v) {
    return v < V{} ? V{} : v;  // in this order NaN stays NaN
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

template <int P>
using Count = std::integral_constant<int, P>;

// f(lanes, channel) over the channels of a group: full registers, then narrower ones for the rest.
template <class A, int N = kLanes<A>, class F>
INLINE void each_register(int64_t channel, int64_t channels, F f) {
    for (; channel + N <= channels; channel += N) f(Count<N>{}, channel);
    if constexpr (N > 1) each_register<A, N / 2>(channel, channels, f);
}

// Keeps a loaded value in a register: compilers fold the load into each of its uses, and loads are what is scarce.
template <class V>
INLINE void in_register(V& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__SSE2__)
    if constexpr (sizeof v <= kRegisterBytes) asm("" : "+x"(v));
#else
    (void)v;
#endif
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
