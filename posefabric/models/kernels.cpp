// The fast path's CPU kernels: depthwise convolutions, and sums of weighted, normalised maps.
//
// Maps are (N, H, W, C) in memory. Everything exists in float and in double, so that a test in
// double proves the code that trains in float, and with maps in bfloat16 that are computed with in
// float: M is what a map is stored in, R what is computed in and what weights and sums are. Work is
// cut into the same pieces whatever the number of threads, and sums are formed in one order:
// results do not depend on it.

#include <omp.h>

#include "depthwise.h"
#include "sums.h"

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
