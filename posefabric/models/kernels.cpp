// The fast path's CPU kernels: depthwise convolutions, and sums of weighted, normalised maps.
//
// Maps are (N, H, W, C) in memory. Everything exists in float and in double, so that a test in
// double proves the code that trains in float, and with maps in bfloat16 that are computed with in
// float: M is what a map is stored in, R what is computed in and what weights and sums are. Work is cut into the same pieces whatever the
// number of threads, and sums are formed in one order: results do not depend on it.

#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

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

// Maps to what is computed in, and back.
template <class M, class R> static inline void convert(const M* from, R* to, Int size) {
  typedef typename Lanes<float>::wide V;
  const Int lanes = sizeof(V) / sizeof(float);
  Int i = 0;
  for (; i + lanes <= size; i += lanes) store<V>(to + i, load<V>(from + i));
  for (; i < size; ++i) store<float>(to + i, load<float>(from + i));
}

// ---- depthwise convolutions ----

struct Tap {
  Int place, weight;
};

// For each of `count` places of the output: which places of the input it reads, with which row of
// the kernel. Transposed, output and input change sides: the gradient of the input.
static std::vector<std::vector<Tap>> taps_of(Int count, Int inputs, Int kernel, Int stride,
                                             Int dilation, Int pad, bool transposed) {
  std::vector<std::vector<Tap>> taps(count);
  for (Int i = 0; i < count; ++i)
    for (Int k = 0; k < kernel; ++k) {
      Int place = transposed ? i + pad - k * dilation : i * stride - pad + k * dilation;
      if (transposed) {
        if (place < 0 || place % stride) continue;
        place /= stride;
      }
      if (place >= 0 && place < inputs) taps[i].push_back({place, k});
    }
  return taps;
}

template <class R, class M> struct Pixel {
  const R *source, *weight;
  M* target;
  const std::vector<Tap>*rows, *columns;
  Int row_stride, channels, kernel;

  template <class V, int U> inline void run(Int c) {
    const Int lanes = sizeof(V) / sizeof(R);
    V sum[U];
    for (int u = 0; u < U; ++u) sum[u] = V{};
    for (const Tap& row : *rows) {
      const R* line = source + row.place * row_stride + c;
      const R* line_weight = weight + row.weight * kernel * channels + c;
      for (const Tap& column : *columns) {
        const R* x = line + column.place * channels;
        const R* w = line_weight + column.weight * channels;
        for (int u = 0; u < U; ++u) sum[u] += load<V>(x + u * lanes) * load<V>(w + u * lanes);
      }
    }
    for (int u = 0; u < U; ++u) store<V>(target + c + u * lanes, sum[u]);
  }
};

// A row's pixels from `begin` to `end`, which have all K x K taps: the weights stay in registers.
template <class R, class M, int K> struct Run {
  const R *source, *weight;
  M* target;
  const std::vector<Tap>& rows;
  const std::vector<std::vector<Tap>>& columns;
  Int row_stride, channels, begin, end;

  template <class V, int U> inline void run(Int first) {
    const Int lanes = sizeof(V) / sizeof(R);
    const std::vector<Tap>& taps = columns[begin];
    const Int step =
        end - begin > 1 ? (columns[begin + 1][0].place - taps[0].place) * channels : 0;
    for (int u = 0; u < U; ++u) {
      const Int c = first + u * lanes;
      V w[K * K];
      const R* line[K * K];
      for (int i = 0; i < K; ++i)
        for (int j = 0; j < K; ++j) {
          w[i * K + j] = load<V>(weight + (rows[i].weight * K + taps[j].weight) * channels + c);
          line[i * K + j] = source + rows[i].place * row_stride + taps[j].place * channels + c;
        }
      M* out = target + c;
      for (Int x = 0; x < end - begin; ++x) {
        V sum = load<V>(line[0] + x * step) * w[0];
        for (int k = 1; k < K * K; ++k) sum += load<V>(line[k] + x * step) * w[k];
        store<V>(out + x * channels, sum);
      }
    }
  }
};

// source (batch, height, width, C), weight (kernel * kernel, C) to target (batch, out_height,
// out_width, C). Of maps in fewer digits the rows that a strip of the output reads are converted
// first, once for all taps.
template <class M, class R>
static void depthwise(const M* source, const R* weight, M* target, Int batch, Int height, Int width,
                      Int out_height, Int out_width, Int channels, Int kernel, Int stride,
                      Int dilation, Int top, Int left, Int transposed) {
  auto rows = taps_of(out_height, height, kernel, stride, dilation, top, transposed);
  auto columns = taps_of(out_width, width, kernel, stride, dilation, left, transposed);
  const bool same = std::is_same<M, R>::value;
  const Int strip = same ? 1 : 8, strips = (out_height + strip - 1) / strip;
  const Int line = width * channels;
  // Pixels of a row that have all taps.
  Int inner = 0, after = 0;
  while (inner < out_width && (Int)columns[inner].size() < kernel) ++inner;
  for (after = inner; after < out_width && (Int)columns[after].size() == kernel;) ++after;
#pragma omp parallel
  {
    std::vector<R> converted;
#pragma omp for collapse(2) schedule(static)
    for (Int b = 0; b < batch; ++b)
      for (Int n = 0; n < strips; ++n) {
        const Int end = std::min(out_height, (n + 1) * strip);
        const M* image = source + b * height * line;
        const R* read = reinterpret_cast<const R*>(image);
        if (!same) {
          Int first = height, last = 0;
          for (Int y = n * strip; y < end; ++y)
            for (const Tap& tap : rows[y]) {
              first = std::min(first, tap.place);
              last = std::max(last, tap.place + 1);
            }
          converted.resize(std::max<Int>(1, (last - first) * line));
          if (last > first) convert(image + first * line, converted.data(), (last - first) * line);
          read = converted.data() - first * line;
        }
        for (Int y = n * strip; y < end; ++y) {
          M* out = target + (b * out_height + y) * out_width * channels;
          const bool whole = inner < after && (Int)rows[y].size() == kernel;
          if (whole && kernel == 3) {
            Run<R, M, 3> run = {read, weight,   out + inner * channels, rows[y], columns,
                                line, channels, inner,                  after};
            channel_blocks<R, 1>(0, channels, run);
          }
          if (whole && kernel == 5) {
            Run<R, M, 5> run = {read, weight,   out + inner * channels, rows[y], columns,
                                line, channels, inner,                  after};
            channel_blocks<R, 1>(0, channels, run);
          }
          const bool done = whole && (kernel == 3 || kernel == 5);
          Pixel<R, M> pixel = {read, weight, nullptr, &rows[y], nullptr, line, channels, kernel};
          for (Int x = 0; x < out_width; ++x) {
            if (done && x >= inner && x < after) continue;
            pixel.columns = &columns[x];
            pixel.target = out + x * channels;
            channel_blocks<R, 4>(0, channels, pixel);
          }
        }
      }
  }
}

template <class R> struct WeightGradient {
  const R *source, *slope;
  R* sums;
  Int from, to, height, width, out_height, out_width, channels, kernel, stride, dilation, top, left;

  static Int ceil_div(Int a, Int b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }

  // The outputs whose tap `k` lies inside: first, and one past the last.
  void range(Int k, Int pad, Int inputs, Int outputs, Int& first, Int& end) const {
    const Int shift = pad - k * dilation;
    first = std::max<Int>(0, ceil_div(shift, stride));
    end = std::min<Int>(outputs, ceil_div(inputs + shift, stride));
  }

  template <class V, int U> inline void run(Int c) {
    const Int lanes = sizeof(V) / sizeof(R);
    // Some rows at a time, so that all taps find them in the cache.
    const Int tile = std::max<Int>(1, 96 / out_width);
    for (Int b = from; b < to; ++b)
      for (Int begin = 0; begin < out_height; begin += tile)
        for (Int i = 0; i < kernel; ++i) {
          Int top_row, end_row;
          range(i, top, height, out_height, top_row, end_row);
          top_row = std::max(top_row, begin);
          end_row = std::min(end_row, begin + tile);
          for (Int j = 0; j < kernel; ++j) {
            Int first, end;
            range(j, left, width, out_width, first, end);
            V sum[U];
            for (int u = 0; u < U; ++u) sum[u] = V{};
            for (Int y = top_row; y < end_row; ++y) {
              const R* g = slope + ((b * out_height + y) * out_width + first) * channels + c;
              const Int line = b * height + y * stride - top + i * dilation;
              const Int place = first * stride - left + j * dilation;
              const R* x = source + (line * width + place) * channels + c;
              for (Int n = first; n < end; ++n) {
                for (int u = 0; u < U; ++u)
                  sum[u] += load<V>(x + u * lanes) * load<V>(g + u * lanes);
                g += channels;
                x += stride * channels;
              }
            }
            R* out = sums + (i * kernel + j) * channels + c;
            for (int u = 0; u < U; ++u)
              store<V>(out + u * lanes, load<V>(out + u * lanes) + sum[u]);
          }
        }
  }
};

// Some channels of an image, converted.
template <class M, class R>
static void take_channels(const M* image, R* to, Int pixels, Int channels, Int first, Int count) {
  for (Int n = 0; n < pixels; ++n) convert(image + n * channels + first, to + n * count, count);
}

// The gradient of the weight (kernel * kernel, C), from the input and the output's gradient. Of maps
// in fewer digits an image's block of channels is converted first, once for all taps.
template <class M, class R>
static void depthwise_weight(const M* source, const M* slope, R* gradient, Int batch, Int height,
                             Int width, Int out_height, Int out_width, Int channels, Int kernel,
                             Int stride, Int dilation, Int top, Int left) {
  const bool same = std::is_same<M, R>::value;
  const Int pieces = std::min<Int>(batch, 4), block = same ? 128 : 32;
  const Int size = kernel * kernel * channels, blocks = (channels + block - 1) / block;
  const Int area = height * width, out_area = out_height * out_width;
  std::vector<R> sums(pieces * size, R(0));
#pragma omp parallel
  {
    std::vector<R> own_source, own_slope, own_sums;
#pragma omp for collapse(2) schedule(static)
    for (Int p = 0; p < pieces; ++p)
      for (Int n = 0; n < blocks; ++n) {
        const Int from = batch * p / pieces, to = batch * (p + 1) / pieces;
        const Int first = n * block, count = std::min(channels - first, block);
        WeightGradient<R> piece = {reinterpret_cast<const R*>(source),
                                   reinterpret_cast<const R*>(slope), sums.data() + p * size, from,
                                   to, height, width, out_height, out_width, channels, kernel,
                                   stride, dilation, top, left};
        if (same) {
          channel_blocks<R, 4>(first, first + count, piece);
          continue;
        }
        own_source.resize(area * count);
        own_slope.resize(out_area * count);
        own_sums.assign(kernel * kernel * count, R(0));
        piece.source = own_source.data();
        piece.slope = own_slope.data();
        piece.sums = own_sums.data();
        piece.from = 0;
        piece.to = 1;
        piece.channels = count;
        for (Int b = from; b < to; ++b) {
          take_channels(source + b * area * channels, own_source.data(), area, channels, first,
                        count);
          take_channels(slope + b * out_area * channels, own_slope.data(), out_area, channels, first,
                        count);
          channel_blocks<R, 4>(0, count, piece);
        }
        for (Int i = 0; i < kernel * kernel; ++i)
          for (Int c = 0; c < count; ++c)
            sums[p * size + i * channels + first + c] = own_sums[i * count + c];
      }
  }
  for (Int i = 0; i < size; ++i) {
    R sum = 0;
    for (Int p = 0; p < pieces; ++p) sum += sums[p * size + i];
    gradient[i] = sum;
  }
}

// ---- norms, activations, weighted sums ----

enum { NONE = 0, RELU = 1, RELU6 = 2 };
const Int PIECES = 8, BLOCK = 64;

// Not a number stays what it is.
template <int ACT, class V> static inline V activate(V z) {
  if (ACT == NONE) return z;
  V low = z < 0 ? V{} : z;
  if (ACT == RELU) return low;
  V six = V{} + 6;
  return low > six ? six : low;
}

template <int ACT, class V> static inline V where_active(V z, V g) {
  if (ACT == NONE) return g;
  V passed = z <= 0 ? V{} : g;
  if (ACT == RELU) return passed;
  V six = V{} + 6;
  return z >= six ? V{} : passed;
}

template <class M, class R> struct Moments {
  const M *x, *shift;
  Int begin, end, channels;
  double *sum, *square;

  template <class V, int U> inline void run(Int c) {
    V s[U], q[U], origin[U], value[U];
    for (int u = 0; u < U; ++u) s[u] = q[u] = V{};
    load_map<R, V, U>(shift + c, origin);
    for (Int n = begin; n < end; ++n) {
      load_map<R, V, U>(x + n * channels + c, value);
      for (int u = 0; u < U; ++u) {
        V d = value[u] - origin[u];
        s[u] += d;
        q[u] += d * d;
      }
    }
    add_lanes<M, R, V, U>(s, sum + c);
    add_lanes<M, R, V, U>(q, square + c);
  }
};

// Sums of x - x[0], x[0] being the first pixel's values, and of its square, two rows of C: these
// round less than those of x. `about_zero` makes them those of x afterwards, in double, which
// processes can add up.
template <class M, class R>
static void moments(const M* x, Int rows, Int channels, Int about_zero, double* out) {
  const Int pieces = std::min(rows, PIECES);
  std::vector<double> sums(pieces * 2 * channels, 0.0);
#pragma omp parallel for schedule(static)
  for (Int p = 0; p < pieces; ++p) {
    const Int last = rows * (p + 1) / pieces;
    for (Int n = rows * p / pieces; n < last; n += BLOCK) {
      double* own = sums.data() + p * 2 * channels;
      Moments<M, R> part = {x, x, n, std::min(n + BLOCK, last), channels, own, own + channels};
      channel_blocks<R, 2>(0, channels, part);
    }
  }
  for (Int c = 0; c < channels; ++c) {
    double sum = 0, square = 0;
    for (Int p = 0; p < pieces; ++p) {
      sum += sums[p * 2 * channels + c];
      square += sums[(p * 2 + 1) * channels + c];
    }
    const double origin = about_zero ? load<R>(x + c) : R(0);
    out[c] = rows * origin + sum;
    out[channels + c] = square + origin * (2 * sum + rows * origin);
  }
}

// Of the moments about `origin` (none: zero) of `rows` values a channel, which may be more than this
// process has: mean, 1 / deviation, and the factor and summand of the norm, four rows of C. Moves
// the running statistics, where there are any.
template <class M, class R>
static void norm_factors(const double* sums, const M* origin, double rows, Int channels,
                         const R* gamma, const R* beta, R* running_mean, R* running_var,
                         double momentum, double eps, R* out) {
  for (Int c = 0; c < channels; ++c) {
    const double off = sums[c] / rows, mean = (origin ? load<R>(origin + c) : R(0)) + off;
    // A comparison that keeps what is not a number.
    double variance = sums[channels + c] / rows - off * off;
    if (variance < 0) variance = 0;
    const double scale = 1 / std::sqrt(variance + eps);
    const double factor = scale * (gamma ? gamma[c] : 1.0);
    out[c] = mean;
    out[channels + c] = scale;
    out[2 * channels + c] = factor;
    out[3 * channels + c] = (beta ? beta[c] : 0.0) - mean * factor;
    if (running_mean) {
      const double unbiased = variance * rows / (rows > 1 ? rows - 1 : 1);
      running_mean[c] += momentum * (mean - running_mean[c]);
      running_var[c] += momentum * (unbiased - running_var[c]);
    }
  }
}

template <class M, class R, class T, int ACT, bool NORMED, bool FIRST> struct Mix {
  const M* x;
  const R *factor, *summand;
  R weight;
  T* sum;
  Int pixels, channels;
  bool relu;

  template <class V, int U> inline void run(Int c) {
    V f[U], s[U], z[U], before[U];
    if (NORMED) {
      load_row<M, R, V, U>(factor + c, f);
      load_row<M, R, V, U>(summand + c, s);
    }
    for (Int n = 0; n < pixels; ++n) {
      const Int at = n * channels + c;
      load_map<R, V, U>(x + at, z);
      if (!FIRST) load_map<R, V, U>(sum + at, before);
      for (int u = 0; u < U; ++u) {
        if (NORMED) z[u] = z[u] * f[u] + s[u];
        z[u] = activate<ACT>(z[u]) * weight;
        if (!FIRST) z[u] += before[u];
        if (relu) z[u] = activate<RELU>(z[u]);
      }
      store_map<R, V, U>(sum + at, z);
    }
  }
};

template <class M, class R, class T, int ACT, bool NORMED>
static void mix_pixels(const M* x, const R* factor, const R* summand, R weight, T* sum, Int pixels,
                       Int channels, bool first, bool relu) {
  if (first) {
    Mix<M, R, T, ACT, NORMED, true> mix = {x,   factor, summand,  weight,
                                           sum, pixels, channels, relu};
    channel_blocks<R, 2>(0, channels, mix);
  } else {
    Mix<M, R, T, ACT, NORMED, false> mix = {x,   factor, summand,  weight,
                                            sum, pixels, channels, relu};
    channel_blocks<R, 2>(0, channels, mix);
  }
}

// The terms' sum at some pixels from `at` on.
template <class M, class R, class T>
static void mix_terms(Int terms, const M** x, const R** factor, const Int* act,
                      const double* weight, T* sum, Int at, Int pixels, Int channels, bool relu) {
  for (Int t = 0; t < terms; ++t) {
    const M* map = x[t] + at;
    const R* f = factor[t];
    const R* s = f ? f + channels : nullptr;
    const bool first = t == 0, last = relu && t == terms - 1;
    const R w = weight[t];
    if (!f)
      mix_pixels<M, R, T, NONE, false>(map, f, s, w, sum, pixels, channels, first, last);
    else if (act[t] == NONE)
      mix_pixels<M, R, T, NONE, true>(map, f, s, w, sum, pixels, channels, first, last);
    else if (act[t] == RELU)
      mix_pixels<M, R, T, RELU, true>(map, f, s, w, sum, pixels, channels, first, last);
    else
      mix_pixels<M, R, T, RELU6, true>(map, f, s, w, sum, pixels, channels, first, last);
  }
}

// What grew in R, in the order of the map's blocks, to the map.
template <class M, class R> struct Finish {
  const R* sum;
  M* out;
  Int pixels, channels;

  template <class V, int U> inline void run(Int c) {
    V z[U];
    for (Int n = 0; n < pixels; ++n) {
      load_map<R, V, U>(sum + n * channels + c, z);
      store_map<R, V, U>(out + n * channels + c, z);
    }
  }
};

// out = sum over terms of weight * act(x * factor + summand), then perhaps a ReLU. A sum of several
// grows in R.
template <class M, class R>
static void mix(Int terms, const M** x, const R** factor, const Int* act, const double* weight,
                Int rows, Int channels, Int relu, M* out) {
  const Int step = std::max<Int>(1, 4096 / channels);
#pragma omp parallel
  {
    std::vector<R> beside(std::is_same<M, R>::value || terms == 1 ? 0 : step * channels);
#pragma omp for schedule(static)
    for (Int begin = 0; begin < rows; begin += step) {
      const Int pixels = std::min(rows, begin + step) - begin, at = begin * channels;
      if (beside.empty()) {
        mix_terms(terms, x, factor, act, weight, out + at, at, pixels, channels, relu);
      } else {
        mix_terms(terms, x, factor, act, weight, beside.data(), at, pixels, channels, relu);
        Finish<M, R> finish = {beside.data(), out + at, pixels, channels};
        channel_blocks<R, 2>(0, channels, finish);
      }
    }
  }
}

// One term's slopes: g where the sum's ReLU and the term's own let it pass.
template <class M, class R, int ACT, bool NORMED> struct Slopes {
  const M *x, *g, *sum;
  const R* stats;  // mean, 1 / deviation, factor, summand
  Int channels;

  template <class V, int U>
  inline void slope(Int at, const V* value, const V* factor, const V* summand, V* passed) const {
    load_map<R, V, U>(g + at, passed);
    if (sum) {
      V total[U];
      load_map<R, V, U>(sum + at, total);
      for (int u = 0; u < U; ++u) passed[u] = where_active<RELU>(total[u], passed[u]);
    }
    for (int u = 0; u < U && NORMED; ++u)
      passed[u] = where_active<ACT>(value[u] * factor[u] + summand[u], passed[u]);
  }

  template <class V, int U> inline void stat(Int row, Int c, V* found) const {
    if (NORMED) load_row<M, R, V, U>(stats + row * channels + c, found);
  }
};

template <class M, class R, int ACT, bool NORMED> struct Reduce {
  Slopes<M, R, ACT, NORMED> slopes;
  Int begin, end;
  double *sum, *product;

  template <class V, int U> inline void run(Int c) {
    V s[U], q[U], mean[U], factor[U], summand[U], value[U], g[U];
    for (int u = 0; u < U; ++u) s[u] = q[u] = V{};
    slopes.template stat<V, U>(0, c, mean);
    slopes.template stat<V, U>(2, c, factor);
    slopes.template stat<V, U>(3, c, summand);
    for (Int n = begin; n < end; ++n) {
      const Int at = n * slopes.channels + c;
      load_map<R, V, U>(slopes.x + at, value);
      slopes.template slope<V, U>(at, value, factor, summand, g);
      for (int u = 0; u < U; ++u) {
        if (NORMED) value[u] -= mean[u];
        s[u] += g[u];
        q[u] += g[u] * value[u];
      }
    }
    add_lanes<M, R, V, U>(s, sum + c);
    add_lanes<M, R, V, U>(q, product + c);
  }
};

template <class M, class R, int ACT, bool NORMED> struct Apply {
  Slopes<M, R, ACT, NORMED> slopes;
  Int begin, end;
  const R *direct, *linear, *constant;
  M* out;

  template <class V, int U> inline void run(Int c) {
    V mean[U], factor[U], summand[U], by_slope[U], by_value[U], rest[U], value[U], found[U];
    slopes.template stat<V, U>(0, c, mean);
    slopes.template stat<V, U>(2, c, factor);
    slopes.template stat<V, U>(3, c, summand);
    load_row<M, R, V, U>(direct + c, by_slope);
    if (NORMED) {
      load_row<M, R, V, U>(linear + c, by_value);
      load_row<M, R, V, U>(constant + c, rest);
    }
    for (Int n = begin; n < end; ++n) {
      const Int at = n * slopes.channels + c;
      if (NORMED) load_map<R, V, U>(slopes.x + at, value);
      slopes.template slope<V, U>(at, value, factor, summand, found);
      for (int u = 0; u < U; ++u) {
        found[u] *= by_slope[u];
        if (NORMED) found[u] += (value[u] - mean[u]) * by_value[u] + rest[u];
      }
      store_map<R, V, U>(out + at, found);
    }
  }
};

// A term's backward pass comes in two: its sums over pixels, and, for the input, what they make of
// every pixel. Between the two, processes may add up theirs.

// Sums of the slopes, and of their products with x (less its mean, of a norm), two rows of C. What
// comes back is the gradient of the weight.
template <class M, class R, int ACT, bool NORMED>
static double term_sums(const Slopes<M, R, ACT, NORMED>& slopes, const R* gamma, const R* beta,
                        double weight, Int rows, double* total, R* dgamma, R* dbeta) {
  const Int channels = slopes.channels, pieces = std::min(rows, PIECES);
  std::vector<double> sums(pieces * 2 * channels, 0.0);
#pragma omp parallel for schedule(static)
  for (Int p = 0; p < pieces; ++p) {
    const Int last = rows * (p + 1) / pieces;
    double* own = sums.data() + p * 2 * channels;
    for (Int n = rows * p / pieces; n < last; n += BLOCK) {
      Reduce<M, R, ACT, NORMED> part = {slopes, n, std::min(n + BLOCK, last), own, own + channels};
      channel_blocks<R, 2>(0, channels, part);
    }
  }
  for (Int i = 0; i < 2 * channels; ++i) {
    total[i] = 0;
    for (Int p = 0; p < pieces; ++p) total[i] += sums[p * 2 * channels + i];
  }
  double by_weight = 0;
  for (Int c = 0; c < channels; ++c) {
    if (!NORMED) {
      by_weight += total[channels + c];
      continue;
    }
    const double by_gamma = total[channels + c] * slopes.stats[channels + c];
    by_weight += (gamma ? gamma[c] : 1.0) * by_gamma + (beta ? beta[c] : 0.0) * total[c];
    if (dgamma) dgamma[c] = weight * by_gamma;
    if (dbeta) dbeta[c] = weight * total[c];
  }
  return by_weight;
}

// The gradient of the input; `total` is of `all_rows` values a channel, of which `rows` are here.
template <class M, class R, int ACT, bool NORMED>
static void term_input(const Slopes<M, R, ACT, NORMED>& slopes, const R* gamma, double weight,
                       Int rows, const double* total, double all_rows, M* dx) {
  const Int channels = slopes.channels, step = std::max<Int>(1, 4096 / channels);
  std::vector<R> factors(3 * channels);
  for (Int c = 0; c < channels; ++c) {
    if (!NORMED) {
      factors[c] = weight;
      continue;
    }
    const double scale = slopes.stats[channels + c];
    const double direct = weight * (gamma ? gamma[c] : 1.0) * scale;
    factors[c] = direct;
    factors[channels + c] = -direct * total[channels + c] * scale / all_rows * scale;
    factors[2 * channels + c] = -direct * total[c] / all_rows;
  }
#pragma omp parallel for schedule(static)
  for (Int n = 0; n < rows; n += step) {
    Apply<M, R, ACT, NORMED> part = {slopes,         n, std::min(rows, n + step),
                                  factors.data(), factors.data() + channels,
                                  factors.data() + 2 * channels, dx};
    channel_blocks<R, 2>(0, channels, part);
  }
}

// Calls f(slopes) for the term's activation, and whether it has a norm.
template <class M, class R, class F>
static auto with_slopes(const M* x, const M* g, const M* sum, const R* stats, Int act, Int channels,
                        F f) {
  if (!stats) return f(Slopes<M, R, NONE, false>{x, g, sum, stats, channels});
  if (act == NONE) return f(Slopes<M, R, NONE, true>{x, g, sum, stats, channels});
  if (act == RELU) return f(Slopes<M, R, RELU, true>{x, g, sum, stats, channels});
  return f(Slopes<M, R, RELU6, true>{x, g, sum, stats, channels});
}

// Of the OpenMP that these kernels use, of which torch may have another copy.
extern "C" void use_threads(Int count) { omp_set_num_threads(count); }
extern "C" Int threads() { return omp_get_max_threads(); }

#define EXPORT(M, R, S)                                                                           \
  extern "C" void depthwise_##S(const M* x, const R* w, M* y, Int b, Int h, Int wd, Int oh,       \
                                Int ow, Int c, Int k, Int s, Int d, Int t, Int l, Int tr) {       \
    depthwise<M, R>(x, w, y, b, h, wd, oh, ow, c, k, s, d, t, l, tr);                             \
  }                                                                                               \
  extern "C" void depthwise_weight_##S(const M* x, const M* g, R* dw, Int b, Int h, Int wd,       \
                                       Int oh, Int ow, Int c, Int k, Int s, Int d, Int t,         \
                                       Int l) {                                                   \
    depthwise_weight<M, R>(x, g, dw, b, h, wd, oh, ow, c, k, s, d, t, l);                         \
  }                                                                                               \
  extern "C" void moments_##S(const M* x, Int n, Int c, Int about_zero, double* out) {            \
    moments<M, R>(x, n, c, about_zero, out);                                                      \
  }                                                                                               \
  extern "C" void norm_factors_##S(const double* sums, const M* origin, double n, Int c,          \
                                   const R* gamma, const R* beta, R* rm, R* rv, double momentum,  \
                                   double eps, R* out) {                                          \
    norm_factors<M, R>(sums, origin, n, c, gamma, beta, rm, rv, momentum, eps, out);              \
  }                                                                                               \
  extern "C" void mix_##S(Int terms, const M** x, const R** f, const Int* act, const double* w,   \
                          Int n, Int c, Int relu, M* out) {                                       \
    mix<M, R>(terms, x, f, act, w, n, c, relu, out);                                              \
  }                                                                                               \
  extern "C" double term_sums_##S(const M* x, const M* g, const M* sum, const R* stats, Int act,  \
                                  Int n, Int c, const R* gamma, const R* beta, double w,          \
                                  double* total, R* dgamma, R* dbeta) {                           \
    return with_slopes(x, g, sum, stats, act, c, [=](const auto& slopes) {                        \
      return term_sums(slopes, gamma, beta, w, n, total, dgamma, dbeta);                          \
    });                                                                                           \
  }                                                                                               \
  extern "C" void term_input_##S(const M* x, const M* g, const M* sum, const R* stats, Int act,   \
                                 Int n, Int c, const R* gamma, double w, const double* total,     \
                                 double all_rows, M* dx) {                                        \
    with_slopes(x, g, sum, stats, act, c, [=](const auto& slopes) {                               \
      term_input(slopes, gamma, w, n, total, all_rows, dx);                                       \
    });                                                                                           \
  }

EXPORT(float, float, f32)
EXPORT(double, double, f64)
EXPORT(Bf16, float, bf16)
