// Vectors of the channels of a map, in float, in double and in bfloat16, and back.

#pragma once

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#include <type_traits>

typedef long long Int;

// Vectors of channels: of 32 bytes, and wide ones where the processor has them.
#ifdef __AVX512F__
#define WIDE 64
#else
#define WIDE 32
#endif
template <class R> struct Lanes {
  typedef R type __attribute__((vector_size(32)));
  typedef R wide __attribute__((vector_size(WIDE)));
};

// Through memcpy, because a template's argument loses the alignment its typedef had.
template <class V, class R> static inline V load(const R* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class R> static inline void store(R* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The upper half of a float.
struct Bf16 {
  unsigned short bits;
};
template <int SIZE> struct Words {
  typedef unsigned int type __attribute__((vector_size(SIZE)));
  typedef unsigned short halves __attribute__((vector_size(SIZE / 2)));
};

template <class V> static inline V load(const Bf16* p) {
  V found;
  if constexpr (sizeof(V) == sizeof(float)) {
    const unsigned int word = (unsigned int)p->bits << 16;
    __builtin_memcpy(&found, &word, sizeof found);
  } else {
    typename Words<sizeof(V)>::halves halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    const auto words = __builtin_convertvector(halves, typename Words<sizeof(V)>::type) << 16;
    __builtin_memcpy(&found, &words, sizeof found);
  }
  return found;
}

// To the nearest, the even one of two; what is not a number stays none.
template <class V> static inline void store(Bf16* p, V v) {
  if constexpr (sizeof(V) == sizeof(float)) {
    unsigned int word;
    __builtin_memcpy(&word, &v, sizeof word);
    p->bits = v != v ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  } else if constexpr (sizeof(V) == 64) {
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &halves, sizeof halves);
  } else if constexpr (sizeof(V) == 32) {
    const __m128bh halves = _mm256_cvtneps_pbh((__m256)v);
    __builtin_memcpy(p, &halves, sizeof halves);
#endif
  } else {
    typedef typename Words<sizeof(V)>::type W;
    W words, none = (W)(v != v);
    __builtin_memcpy(&words, &v, sizeof words);
    words = (words + 0x7fff + (words >> 16 & 1)) >> 16;
    words = (words & ~none) | (none & 0x7fc0);
    const auto halves = __builtin_convertvector(words, typename Words<sizeof(V)>::halves);
    __builtin_memcpy(p, &halves, sizeof halves);
  }
}

// U vectors of channels. Two vectors of a map in bfloat16 are its even and its odd channels, which
// come apart by a shift and a mask; what stands beside it channel by channel follows.
template <class M, class V, int U> constexpr bool apart() {
  return std::is_same<M, Bf16>::value && U % 2 == 0 && sizeof(V) > sizeof(float);
}

// Where lane i of vector u lies.
template <class M, class R, class V, int U> static inline Int place_of(int u, Int i) {
  const Int lanes = sizeof(V) / sizeof(R);
  return apart<M, V, U>() ? (u - u % 2) * lanes + 2 * i + u % 2 : u * lanes + i;
}

template <class R, class V, int U, class M> static inline void load_map(const M* p, V* found) {
  const Int lanes = sizeof(V) / sizeof(R);
  for (int u = 0; u < U; ++u)
    if constexpr (apart<M, V, U>()) {
      typename Words<sizeof(V)>::type words;
      __builtin_memcpy(&words, p + (u - u % 2) * lanes, sizeof words);
      words = u % 2 ? words & 0xffff0000u : words << 16;
      __builtin_memcpy(found + u, &words, sizeof words);
    } else {
      found[u] = load<V>(p + u * lanes);
    }
}

template <class R, class V, int U, class M> static inline void store_map(M* p, const V* values) {
  const Int lanes = sizeof(V) / sizeof(R);
  if constexpr (apart<M, V, U>()) {
    for (int u = 0; u < U; u += 2) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
      if constexpr (sizeof(V) == 64) {
        const __m512i order = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
            4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)values[u + 1], (__m512)values[u]);
        _mm512_storeu_si512(p + u * lanes, _mm512_permutexvar_epi16(order, (__m512i)both));
        continue;
      }
#endif
      M even[sizeof(V) / sizeof(R)], odd[sizeof(V) / sizeof(R)];
      store<V>(even, values[u]);
      store<V>(odd, values[u + 1]);
      for (Int i = 0; i < lanes; ++i) {
        p[u * lanes + 2 * i] = even[i];
        p[u * lanes + 2 * i + 1] = odd[i];
      }
    }
  } else {
    for (int u = 0; u < U; ++u) store<V>(p + u * lanes, values[u]);
  }
}

// Of a row of R for each channel, what belongs to the vectors of a map of M.
template <class M, class R, class V, int U> static inline void load_row(const R* p, V* found) {
  for (int u = 0; u < U; ++u) {
    R own[sizeof(V) / sizeof(R)];
    for (Int i = 0; i < Int(sizeof(V) / sizeof(R)); ++i) own[i] = p[place_of<M, R, V, U>(u, i)];
    found[u] = load<V>(own);
  }
}

// Sums of U vectors of channels, on in double.
template <class M, class R, class V, int U>
static inline void add_lanes(const V* found, double* sums) {
  for (int u = 0; u < U; ++u) {
    R own[sizeof(V) / sizeof(R)];
    store<V>(own, found[u]);
    for (Int i = 0; i < Int(sizeof(V) / sizeof(R)); ++i)
      sums[place_of<M, R, V, U>(u, i)] += own[i];
  }
}

// Calls f.run<V, U>(c) for channel blocks of U wide vectors, of two and one, of one channel.
template <class R, int U, class F> static inline void channel_blocks(Int from, Int to, F& f) {
  typedef typename Lanes<R>::type V;
  typedef typename Lanes<R>::wide W;
  const Int lanes = sizeof(V) / sizeof(R), wide = sizeof(W) / sizeof(R);
  Int c = from;
  for (; c + U * wide <= to; c += U * wide) f.template run<W, U>(c);
  if (U > 2)
    for (; c + 2 * wide <= to; c += 2 * wide) f.template run<W, 2>(c);
  for (; c + wide <= to; c += wide) f.template run<W, 1>(c);
  for (; c + lanes <= to; c += lanes) f.template run<V, 1>(c);
  for (; c < to; ++c) f.template run<R, 1>(c);
}

// Maps to what is computed in.
template <class M, class R> static inline void convert(const M* from, R* to, Int size) {
  typedef typename Lanes<R>::type V;
  typedef typename Lanes<R>::wide W;
  const Int lanes = sizeof(V) / sizeof(R), wide = sizeof(W) / sizeof(R);
  Int i = 0;
  for (; i + wide <= size; i += wide) store<W>(to + i, load<W>(from + i));
  for (; i + lanes <= size; i += lanes) store<V>(to + i, load<V>(from + i));
  for (; i < size; ++i) store<R>(to + i, load<R>(from + i));
}
