// The fast path's CPU kernels: depthwise convolutions, and sums of weighted, normalised maps.
//
// Maps are (N, H, W, C) in memory. Everything exists in float and in double, so that a test in
// double proves the code that trains in float, and with maps in bfloat16 that are computed with in
// float: M is what a map is stored in, R what is computed in and what weights and sums are. Work is
// cut into the same pieces whatever the number of threads, and sums are formed in one order:
// results do not depend on it.

#include <omp.h>

#include "depthwise.h"
#include "pointwise.h"
#include "weighted_sum.h"

// Of the OpenMP that these kernels use, of which torch may have another copy.
extern "C" void use_threads(Int count) { omp_set_num_threads(count); }
extern "C" Int threads() { return omp_get_max_threads(); }

#define EXPORT(M, R, S)                                                                           \
  extern "C" void depthwise_##S(const M* x, const R* stats, Int act, const R* w, const M* plus,    \
                                M* y, Int b, Int h, Int wd, Int oh, Int ow, Int c, Int k, Int s,  \
                                Int d, Int t, Int l, Int tr) {                                    \
    depthwise<M, R>(x, {stats, act}, w, plus, y, b, h, wd, oh, ow, c, k, s, d, t, l, tr);         \
  }                                                                                               \
  extern "C" void depthwise_weight_##S(const M* x, const R* stats, Int act, const M* g, R* dw,    \
                                       Int b, Int h, Int wd, Int oh, Int ow, Int c, Int k, Int s, \
                                       Int d, Int t, Int l) {                                     \
    depthwise_weight<M, R>(x, {stats, act}, g, dw, b, h, wd, oh, ow, c, k, s, d, t, l);           \
  }                                                                                               \
  extern "C" double weighted_sum_##S(Int count, const void* terms, Int n, Int c, Int again,        \
                                     AddUp add, void* context, Int relu, M* out) {                \
    return weighted_sum(count, static_cast<const Term<M, R>*>(terms), n, c, again,                \
                        {add, context}, relu, out);                                               \
  }                                                                                               \
  extern "C" Int weighted_sum_back_##S(Int count, const void* terms, Int n, Int c, const M* g,     \
                                       const M* sum, M* passed, double* totals, double values,    \
                                       AddUp add, void* context) {                                \
    return weighted_sum_back(count, static_cast<const Slope<M, R>*>(terms), n, c, g, sum, passed, \
                             totals, values, {add, context});                                     \
  }

EXPORT(float, float, f32)
EXPORT(double, double, f64)
EXPORT(Bf16, float, bf16)

// Of maps in bfloat16, where the processor has tiles for it.
extern "C" Int has_tiles() {
#if HAS_TILES
  return tiles_granted();
#else
  return 0;
#endif
}
extern "C" void pointwise_bf16(const Bf16* x, const float* w, const float* bias, const Bf16* plus,
                               Bf16* y, Int n, Int in, Int out, Int transposed) {
  pointwise(x, w, bias, plus, y, n, in, out, transposed);
}
extern "C" void pointwise_weight_bf16(const Bf16* x, const Bf16* g, float* dw, Int n, Int in,
                                      Int out) {
  pointwise_weight(x, g, dw, n, in, out);
}
