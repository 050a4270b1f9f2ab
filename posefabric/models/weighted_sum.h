// A sum of terms and its gradients, as they are called: one call for all terms of a map.

#pragma once

#include "sums.h"

// Of a term, forwards. `stats` is null without a norm, else four rows of C to be filled.
template <class M, class R> struct Term {
  const M* x;
  const R *gamma, *beta, *bias;
  R *running_mean, *running_var;
  Int* batches;
  R* stats;
  Int act;
  double weight, momentum, eps;
};

// What of it is wanted: sums over this process's pixels, what they make of the norms, the sum.
enum { GATHER = 1, FACTORS = 2, MIX = 4 };

// `sums` (norms, 2 C) is null where all is wanted at once; `values` are of all processes.
template <class M, class R>
static void weighted_sum(Int count, const Term<M, R>* terms, Int rows, Int channels, Int wanted,
                         double* sums, double values, Int relu, M* out) {
  const bool whole = (wanted & GATHER) && (wanted & FACTORS);
  std::vector<double> own(whole ? 2 * channels : 0);
  double* place = sums;
  for (Int t = 0; t < count; ++t) {
    const Term<M, R>& term = terms[t];
    if (!term.stats) continue;
    double* found = whole ? own.data() : place;
    if (wanted & GATHER) moments<M, R>(term.x, rows, channels, !whole, found);
    if (wanted & FACTORS) {
      norm_factors<M, R>(found, whole ? term.x : nullptr, values, channels, term.gamma, term.beta,
                         term.bias, term.running_mean, term.running_var, term.momentum, term.eps,
                         term.stats);
      if (term.batches) ++*term.batches;
    }
    if (place) place += 2 * channels;
  }
  if (!(wanted & MIX)) return;
  std::vector<const M*> x(count);
  std::vector<const R*> factors(count);
  std::vector<Int> acts(count);
  std::vector<double> weights(count);
  for (Int t = 0; t < count; ++t) {
    x[t] = terms[t].x;
    factors[t] = terms[t].stats ? terms[t].stats + 2 * channels : nullptr;
    acts[t] = terms[t].act;
    weights[t] = terms[t].weight;
  }
  mix<M, R>(count, x.data(), factors.data(), acts.data(), weights.data(), rows, channels, relu,
            out);
}

// Of a term, backwards: what is null is not wanted.
template <class M, class R> struct Slope {
  const M* x;
  const R *gamma, *beta, *stats;
  R *dgamma, *dbeta;
  M* dx;
  Int act, wants_weight;
  double weight;
};

// `totals` has 2 C + 1 numbers a term: the sums that its map's gradient needs, and the gradient of
// its weight. `sum` is the sum itself where it has a ReLU; `passed`, where there is one, takes the
// gradient that the ReLU lets through, once for all terms.
template <class M, class R>
static void weighted_sum_back(Int count, const Slope<M, R>* terms, Int rows, Int channels,
                              Int wanted, const M* g, const M* sum, M* passed, double* totals,
                              double values) {
  if (passed) {
    if (wanted & GATHER)
      term_input<M, R, NONE, false>({g, g, sum, nullptr, channels}, nullptr, 1.0, rows, nullptr,
                                    1.0, passed);
    g = passed;
    sum = nullptr;
  }
  for (Int t = 0; t < count; ++t) {
    const Slope<M, R>& term = terms[t];
    double* total = totals + t * (2 * channels + 1);
    with_slopes(term.x, g, sum, term.stats, term.act, channels, [&](const auto& slopes) {
      // One after the other, while the map is in the cache.
      if ((wanted & GATHER) && (term.stats || term.wants_weight))
        total[2 * channels] = term_sums(slopes, term.gamma, term.beta, term.weight, rows, total,
                                        term.dgamma, term.dbeta);
      if ((wanted & MIX) && term.dx)
        term_input(slopes, term.gamma, term.weight, rows, total, values, term.dx);
    });
  }
}
