// Norms, activations and weighted sums of maps in one pass, forwards and backwards.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

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
// the running statistics, where there are any; their mean is that of x + bias.
template <class M, class R>
static void norm_factors(const double* sums, const M* origin, double rows, Int channels,
                         const R* gamma, const R* beta, const R* bias, R* running_mean,
                         R* running_var, double momentum, double eps, R* out) {
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
      running_mean[c] += momentum * (mean + (bias ? bias[c] : 0.0) - running_mean[c]);
      running_var[c] += momentum * (unbiased - running_var[c]);
    }
  }
}

// The same rows of a norm by its running statistics, of x + bias.
template <class R>
static void frozen_factors(Int channels, const R* gamma, const R* beta, const R* bias,
                           const R* running_mean, const R* running_var, double eps, R* out) {
  for (Int c = 0; c < channels; ++c) {
    const double mean = running_mean[c] - (bias ? bias[c] : 0.0);
    const double scale = 1 / std::sqrt(running_var[c] + eps);
    const double factor = scale * (gamma ? gamma[c] : 1.0);
    out[c] = mean;
    out[channels + c] = scale;
    out[2 * channels + c] = factor;
    out[3 * channels + c] = (beta ? beta[c] : 0.0) - mean * factor;
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
