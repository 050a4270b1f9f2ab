// The fast path's CPU kernels: depthwise convolutions, and sums of weighted, normalised maps.
//
// Maps are (N, H, W, C) in memory. Everything exists in float and in double, so that a test in
// double proves the code that trains in float. Work is cut into the same pieces whatever the
// number of threads, and sums are formed in one order: results do not depend on it.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

typedef long long Int;

template <class R> struct Lanes;
template <> struct Lanes<float> {
  typedef float type __attribute__((vector_size(32)));
};
template <> struct Lanes<double> {
  typedef double type __attribute__((vector_size(32)));
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

// Sums of U vectors of channels, on in double.
template <class R, class V, int U> static inline void add_lanes(const V* found, double* sums) {
  const Int lanes = sizeof(V) / sizeof(R);
  for (int u = 0; u < U; ++u) {
    R own[sizeof(V) / sizeof(R)];
    store<V>(own, found[u]);
    for (Int i = 0; i < lanes; ++i) sums[u * lanes + i] += own[i];
  }
}

// Calls f.run<V, U>(c) for channel blocks of U vectors, of one vector, of one channel.
template <class R, int U, class F> static inline void channel_blocks(Int from, Int to, F& f) {
  typedef typename Lanes<R>::type V;
  const Int lanes = sizeof(V) / sizeof(R);
  Int c = from;
  for (; c + U * lanes <= to; c += U * lanes) f.template run<V, U>(c);
  for (; c + lanes <= to; c += lanes) f.template run<V, 1>(c);
  for (; c < to; ++c) f.template run<R, 1>(c);
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

template <class R> struct Pixel {
  const R *source, *weight;
  R* target;
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

// source (batch, height, width, C), weight (kernel * kernel, C) to target (batch, out_height,
// out_width, C).
template <class R>
static void depthwise(const R* source, const R* weight, R* target, Int batch, Int height, Int width,
                      Int out_height, Int out_width, Int channels, Int kernel, Int stride,
                      Int dilation, Int top, Int left, Int transposed) {
  auto rows = taps_of(out_height, height, kernel, stride, dilation, top, transposed);
  auto columns = taps_of(out_width, width, kernel, stride, dilation, left, transposed);
#pragma omp parallel for collapse(2) schedule(static)
  for (Int b = 0; b < batch; ++b)
    for (Int y = 0; y < out_height; ++y) {
      Pixel<R> pixel = {source + b * height * width * channels, weight, nullptr, &rows[y], nullptr,
                        width * channels, channels, kernel};
      for (Int x = 0; x < out_width; ++x) {
        pixel.columns = &columns[x];
        pixel.target = target + ((b * out_height + y) * out_width + x) * channels;
        channel_blocks<R, 4>(0, channels, pixel);
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

// The gradient of the weight (kernel * kernel, C), from the input and the output's gradient.
template <class R>
static void depthwise_weight(const R* source, const R* slope, R* gradient, Int batch, Int height,
                             Int width, Int out_height, Int out_width, Int channels, Int kernel,
                             Int stride, Int dilation, Int top, Int left) {
  const Int pieces = std::min<Int>(batch, 4), block = 128, size = kernel * kernel * channels;
  const Int blocks = (channels + block - 1) / block;
  std::vector<R> sums(pieces * size, R(0));
#pragma omp parallel for collapse(2) schedule(static)
  for (Int p = 0; p < pieces; ++p)
    for (Int n = 0; n < blocks; ++n) {
      WeightGradient<R> piece = {source, slope, sums.data() + p * size, batch * p / pieces,
                                 batch * (p + 1) / pieces, height, width, out_height, out_width,
                                 channels, kernel, stride, dilation, top, left};
      channel_blocks<R, 4>(n * block, std::min(channels, (n + 1) * block), piece);
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

template <class R> struct Moments {
  const R *x, *shift;
  Int begin, end, channels;
  double *sum, *square;

  template <class V, int U> inline void run(Int c) {
    const Int lanes = sizeof(V) / sizeof(R);
    V s[U], q[U], origin[U];
    for (int u = 0; u < U; ++u) {
      s[u] = q[u] = V{};
      origin[u] = load<V>(shift + c + u * lanes);
    }
    for (Int n = begin; n < end; ++n)
      for (int u = 0; u < U; ++u) {
        V d = load<V>(x + n * channels + c + u * lanes) - origin[u];
        s[u] += d;
        q[u] += d * d;
      }
    add_lanes<R, V, U>(s, sum + c);
    add_lanes<R, V, U>(q, square + c);
  }
};

// Sums of x - x[0], x[0] being the first pixel's values, and of its square, two rows of C: these
// round less than those of x. `about_zero` makes them those of x afterwards, in double, which
// processes can add up.
template <class R>
static void moments(const R* x, Int rows, Int channels, Int about_zero, double* out) {
  const Int pieces = std::min(rows, PIECES);
  std::vector<double> sums(pieces * 2 * channels, 0.0);
#pragma omp parallel for schedule(static)
  for (Int p = 0; p < pieces; ++p) {
    const Int last = rows * (p + 1) / pieces;
    for (Int n = rows * p / pieces; n < last; n += BLOCK) {
      double* own = sums.data() + p * 2 * channels;
      Moments<R> part = {x, x, n, std::min(n + BLOCK, last), channels, own, own + channels};
      channel_blocks<R, 2>(0, channels, part);
    }
  }
  for (Int c = 0; c < channels; ++c) {
    double sum = 0, square = 0;
    for (Int p = 0; p < pieces; ++p) {
      sum += sums[p * 2 * channels + c];
      square += sums[(p * 2 + 1) * channels + c];
    }
    const double origin = about_zero ? x[c] : R(0);
    out[c] = rows * origin + sum;
    out[channels + c] = square + origin * (2 * sum + rows * origin);
  }
}

// Of the moments about `origin` (none: zero) of `rows` values a channel, which may be more than this
// process has: mean, 1 / deviation, and the factor and summand of the norm, four rows of C. Moves
// the running statistics, where there are any.
template <class R>
static void norm_factors(const double* sums, const R* origin, double rows, Int channels,
                         const R* gamma, const R* beta, R* running_mean, R* running_var,
                         double momentum, double eps, R* out) {
  for (Int c = 0; c < channels; ++c) {
    const double off = sums[c] / rows, mean = (origin ? origin[c] : R(0)) + off;
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

template <class R, int ACT, bool NORMED, bool FIRST> struct Mix {
  const R *x, *factor, *summand;
  R weight;
  R* out;
  Int begin, end, channels;
  bool relu;

  template <class V, int U> inline void run(Int c) {
    const Int lanes = sizeof(V) / sizeof(R);
    for (Int n = begin; n < end; ++n)
      for (int u = 0; u < U; ++u) {
        const Int at = n * channels + c + u * lanes, k = c + u * lanes;
        V z = load<V>(x + at);
        if (NORMED) z = z * load<V>(factor + k) + load<V>(summand + k);
        z = activate<ACT>(z) * weight;
        if (!FIRST) z += load<V>(out + at);
        if (relu) z = activate<RELU>(z);
        store<V>(out + at, z);
      }
  }
};

template <class R, int ACT, bool NORMED>
static void mix_rows(const R* x, const R* factor, const R* summand, R weight, R* out, Int begin,
                     Int end, Int channels, bool first, bool relu) {
  if (first) {
    Mix<R, ACT, NORMED, true> mix = {x, factor, summand, weight, out, begin, end, channels, relu};
    channel_blocks<R, 2>(0, channels, mix);
  } else {
    Mix<R, ACT, NORMED, false> mix = {x, factor, summand, weight, out, begin, end, channels, relu};
    channel_blocks<R, 2>(0, channels, mix);
  }
}

// out = sum over terms of weight * act(x * factor + summand), then perhaps a ReLU.
template <class R>
static void mix(Int terms, const R** x, const R** factor, const Int* act, const double* weight,
                Int rows, Int channels, Int relu, R* out) {
  const Int step = std::max<Int>(1, 4096 / channels);
#pragma omp parallel for schedule(static)
  for (Int begin = 0; begin < rows; begin += step) {
    const Int end = std::min(rows, begin + step);
    for (Int t = 0; t < terms; ++t) {
      const R* f = factor[t];
      const R* s = f ? f + channels : nullptr;
      const bool first = t == 0, last = relu && t == terms - 1;
      const R w = weight[t];
      if (!f)
        mix_rows<R, NONE, false>(x[t], f, s, w, out, begin, end, channels, first, last);
      else if (act[t] == NONE)
        mix_rows<R, NONE, true>(x[t], f, s, w, out, begin, end, channels, first, last);
      else if (act[t] == RELU)
        mix_rows<R, RELU, true>(x[t], f, s, w, out, begin, end, channels, first, last);
      else
        mix_rows<R, RELU6, true>(x[t], f, s, w, out, begin, end, channels, first, last);
    }
  }
}

// One term's slopes: g where the sum's ReLU and the term's own let it pass.
template <class R, int ACT, bool NORMED> struct Slopes {
  const R *x, *g, *sum, *stats;  // stats: mean, 1 / deviation, factor, summand
  Int channels;

  template <class V> inline V slope(Int at, Int k, V value) const {
    V passed = load<V>(g + at);
    if (sum) passed = where_active<RELU>(load<V>(sum + at), passed);
    if (!NORMED) return passed;
    V z = value * load<V>(stats + 2 * channels + k) + load<V>(stats + 3 * channels + k);
    return where_active<ACT>(z, passed);
  }
};

template <class R, int ACT, bool NORMED> struct Reduce {
  Slopes<R, ACT, NORMED> slopes;
  Int begin, end;
  double *sum, *product;

  template <class V, int U> inline void run(Int c) {
    const Int lanes = sizeof(V) / sizeof(R);
    V s[U], q[U];
    for (int u = 0; u < U; ++u) s[u] = q[u] = V{};
    for (Int n = begin; n < end; ++n)
      for (int u = 0; u < U; ++u) {
        const Int k = c + u * lanes, at = n * slopes.channels + k;
        V value = load<V>(slopes.x + at);
        V g = slopes.slope(at, k, value);
        if (NORMED) value -= load<V>(slopes.stats + k);
        s[u] += g;
        q[u] += g * value;
      }
    add_lanes<R, V, U>(s, sum + c);
    add_lanes<R, V, U>(q, product + c);
  }
};

template <class R, int ACT, bool NORMED> struct Apply {
  Slopes<R, ACT, NORMED> slopes;
  Int begin, end;
  const R *direct, *linear, *constant;
  R* out;

  template <class V, int U> inline void run(Int c) {
    const Int lanes = sizeof(V) / sizeof(R);
    for (Int n = begin; n < end; ++n)
      for (int u = 0; u < U; ++u) {
        const Int k = c + u * lanes, at = n * slopes.channels + k;
        V value = NORMED ? load<V>(slopes.x + at) : V{};
        V found = slopes.slope(at, k, value) * load<V>(direct + k);
        if (NORMED)
          found += (value - load<V>(slopes.stats + k)) * load<V>(linear + k) + load<V>(constant + k);
        store<V>(out + at, found);
      }
  }
};

// A term's backward pass comes in two: its sums over pixels, and, for the input, what they make of
// every pixel. Between the two, processes may add up theirs.

// Sums of the slopes, and of their products with x (less its mean, of a norm), two rows of C. What
// comes back is the gradient of the weight.
template <class R, int ACT, bool NORMED>
static double term_sums(const Slopes<R, ACT, NORMED>& slopes, const R* gamma, const R* beta,
                        double weight, Int rows, double* total, R* dgamma, R* dbeta) {
  const Int channels = slopes.channels, pieces = std::min(rows, PIECES);
  std::vector<double> sums(pieces * 2 * channels, 0.0);
#pragma omp parallel for schedule(static)
  for (Int p = 0; p < pieces; ++p) {
    const Int last = rows * (p + 1) / pieces;
    double* own = sums.data() + p * 2 * channels;
    for (Int n = rows * p / pieces; n < last; n += BLOCK) {
      Reduce<R, ACT, NORMED> part = {slopes, n, std::min(n + BLOCK, last), own, own + channels};
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
template <class R, int ACT, bool NORMED>
static void term_input(const Slopes<R, ACT, NORMED>& slopes, const R* gamma, double weight,
                       Int rows, const double* total, double all_rows, R* dx) {
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
    Apply<R, ACT, NORMED> part = {slopes,         n, std::min(rows, n + step),
                                  factors.data(), factors.data() + channels,
                                  factors.data() + 2 * channels, dx};
    channel_blocks<R, 2>(0, channels, part);
  }
}

// Calls f(slopes) for the term's activation, and whether it has a norm.
template <class R, class F>
static auto with_slopes(const R* x, const R* g, const R* sum, const R* stats, Int act, Int channels,
                        F f) {
  if (!stats) return f(Slopes<R, NONE, false>{x, g, sum, stats, channels});
  if (act == NONE) return f(Slopes<R, NONE, true>{x, g, sum, stats, channels});
  if (act == RELU) return f(Slopes<R, RELU, true>{x, g, sum, stats, channels});
  return f(Slopes<R, RELU6, true>{x, g, sum, stats, channels});
}

// Of the OpenMP that these kernels use, of which torch may have another copy.
extern "C" void use_threads(Int count) { omp_set_num_threads(count); }
extern "C" Int threads() { return omp_get_max_threads(); }

#define EXPORT(R, S)                                                                              \
  extern "C" void depthwise_##S(const R* x, const R* w, R* y, Int b, Int h, Int wd, Int oh,       \
                                Int ow, Int c, Int k, Int s, Int d, Int t, Int l, Int tr) {       \
    depthwise<R>(x, w, y, b, h, wd, oh, ow, c, k, s, d, t, l, tr);                                \
  }                                                                                               \
  extern "C" void depthwise_weight_##S(const R* x, const R* g, R* dw, Int b, Int h, Int wd,       \
                                       Int oh, Int ow, Int c, Int k, Int s, Int d, Int t,         \
                                       Int l) {                                                   \
    depthwise_weight<R>(x, g, dw, b, h, wd, oh, ow, c, k, s, d, t, l);                            \
  }                                                                                               \
  extern "C" void moments_##S(const R* x, Int n, Int c, Int about_zero, double* out) {            \
    moments<R>(x, n, c, about_zero, out);                                                         \
  }                                                                                               \
  extern "C" void norm_factors_##S(const double* sums, const R* origin, double n, Int c,          \
                                   const R* gamma, const R* beta, R* rm, R* rv, double momentum,  \
                                   double eps, R* out) {                                          \
    norm_factors<R>(sums, origin, n, c, gamma, beta, rm, rv, momentum, eps, out);                 \
  }                                                                                               \
  extern "C" void mix_##S(Int terms, const R** x, const R** f, const Int* act, const double* w,   \
                          Int n, Int c, Int relu, R* out) {                                       \
    mix<R>(terms, x, f, act, w, n, c, relu, out);                                                 \
  }                                                                                               \
  extern "C" double term_sums_##S(const R* x, const R* g, const R* sum, const R* stats, Int act,  \
                                  Int n, Int c, const R* gamma, const R* beta, double w,          \
                                  double* total, R* dgamma, R* dbeta) {                           \
    return with_slopes(x, g, sum, stats, act, c, [=](const auto& slopes) {                        \
      return term_sums(slopes, gamma, beta, w, n, total, dgamma, dbeta);                          \
    });                                                                                           \
  }                                                                                               \
  extern "C" void term_input_##S(const R* x, const R* g, const R* sum, const R* stats, Int act,   \
                                 Int n, Int c, const R* gamma, double w, const double* total,     \
                                 double all_rows, R* dx) {                                        \
    with_slopes(x, g, sum, stats, act, c, [=](const auto& slopes) {                               \
      term_input(slopes, gamma, w, n, total, all_rows, dx);                                       \
    });                                                                                           \
  }

EXPORT(float, f32)
EXPORT(double, f64)
