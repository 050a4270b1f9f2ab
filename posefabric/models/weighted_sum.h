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
  Int act, frozen;  // frozen: by the running statistics, which stay
  double weight, momentum, eps;

  bool gathers() const { return stats && !frozen; }
};

// What adds up values over all processes, in place, and says so in `done`.
typedef void (*AddUp)(void* context, double* values, Int count, int* done);

struct Adder {
  AddUp add;  // null: this process is all there is
  void* context;

  bool adds(std::vector<double>& values) const {
    int done = 0;
    add(context, values.data(), values.size(), &done);
    return done;
  }
};

// The norms' statistics: of this process's pixels, or with an adder of all processes'. Comes back
// with how many values a channel they see: norms want more than one, and nothing is done else; or
// with less than zero where adding up failed.
template <class M, class R>
static double gather_norms(Int count, const Term<M, R>* terms, Int normed, Int rows, Int channels,
                           Adder adder) {
  const bool many = adder.add != nullptr;
  std::vector<double> sums(normed * 2 * channels + 1);
  double* place = sums.data();
  for (Int t = 0; t < count; ++t) {
    if (!terms[t].gathers()) continue;
    moments<M, R>(terms[t].x, rows, channels, many, place);
    place += 2 * channels;
  }
  // Last the values: one operation for all norms of the sum.
  *place = rows;
  if (many && !adder.adds(sums)) return -1;
  const double values = *place;
  if (values <= 1) return values;
  place = sums.data();
  for (Int t = 0; t < count; ++t) {
    const Term<M, R>& term = terms[t];
    if (!term.gathers()) continue;
    norm_factors<M, R>(place, many ? nullptr : term.x, values, channels, term.gamma, term.beta,
                       term.bias, term.running_mean, term.running_var, term.momentum, term.eps,
                       term.stats);
    if (term.batches) ++*term.batches;
    place += 2 * channels;
  }
  return values;
}

// Fills `out`, where there is one. `again`: the norms' statistics stand in their rows. Comes back as
// `gather_norms`.
template <class M, class R>
static double weighted_sum(Int count, const Term<M, R>* terms, Int rows, Int channels, Int again,
                           Adder adder, Int relu, M* out) {
  Int normed = 0;
  for (Int t = 0; t < count; ++t) {
    const Term<M, R>& term = terms[t];
    normed += term.gathers();
    if (term.stats && term.frozen)
      frozen_factors(channels, term.gamma, term.beta, term.bias, term.running_mean,
                     term.running_var, term.eps, term.stats);
  }
  double values = rows;
  if (normed && !again) {
    values = gather_norms(count, terms, normed, rows, channels, adder);
    if (values <= 1) return values;
  }
  if (!out) return values;
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
  return values;
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

// Over all processes, the sums that the gradients of normed maps need; not 0 where it failed.
template <class M, class R>
static Int add_totals(Int count, const Slope<M, R>* terms, Int channels, Adder adder,
                      double* totals) {
  std::vector<double> sums;
  const auto each = [&](auto visit) {
    for (Int t = 0; t < count; ++t)
      if (terms[t].stats && terms[t].dx) visit(totals + t * (2 * channels + 1));
  };
  each([&](double* own) { sums.insert(sums.end(), own, own + 2 * channels); });
  if (sums.empty()) return 0;
  if (!adder.adds(sums)) return 1;
  const double* place = sums.data();
  each([&](double* own) {
    std::copy(place, place + 2 * channels, own);
    place += 2 * channels;
  });
  return 0;
}

// `totals` has 2 C + 1 numbers a term: the sums that its map's gradient needs, and the gradient of
// its weight. `sum` is the sum itself where it has a ReLU; `passed`, where there is one, takes the
// gradient that the ReLU lets through, once for all terms. `values` are of all processes. Comes
// back with 0, or where adding up failed.
template <class M, class R>
static Int weighted_sum_back(Int count, const Slope<M, R>* terms, Int rows, Int channels,
                             const M* g, const M* sum, M* passed, double* totals, double values,
                             Adder adder) {
  if (passed) {
    term_input<M, R, NONE, false>({g, g, sum, nullptr, channels}, nullptr, 1.0, rows, nullptr, 1.0,
                                  passed);
    g = passed;
    sum = nullptr;
  }
  const auto gather = [&](const Slope<M, R>& term, const auto& slopes, double* total) {
    if (term.stats || term.wants_weight)
      total[2 * channels] = term_sums(slopes, term.gamma, term.beta, term.weight, rows, total,
                                      term.dgamma, term.dbeta);
  };
  const auto apply = [&](const Slope<M, R>& term, const auto& slopes, const double* total) {
    if (term.dx) term_input(slopes, term.gamma, term.weight, rows, total, values, term.dx);
  };
  const auto each = [&](auto visit) {
    for (Int t = 0; t < count; ++t) {
      const Slope<M, R>& term = terms[t];
      with_slopes(term.x, g, sum, term.stats, term.act, channels, [&](const auto& slopes) {
        visit(term, slopes, totals + t * (2 * channels + 1));
      });
    }
  };
  if (!adder.add) {
    // One after the other, while the map is in the cache.
    each([&](const auto& term, const auto& slopes, double* total) {
      gather(term, slopes, total);
      apply(term, slopes, total);
    });
    return 0;
  }
  each(gather);
  if (add_totals(count, terms, channels, adder, totals)) return 1;
  each(apply);
  return 0;
}
