// Depthwise convolutions, and their gradients.

#pragma once

#include <algorithm>
#include <vector>

#include "room.h"
#include "sums.h"

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

// What a convolution reads in place of its source: act(source * factor + summand). `stats` is null
// where it reads the source itself, else a norm's four rows of C.
template <class R> struct Before {
  const R* stats;
  Int act;
};

// Pixels of `channels`, of which some are taken, to R and through the norm before.
template <class M, class R, int ACT> struct Taken {
  const M* from;
  const R* stats;
  R* to;
  Int pixels, from_channels, to_channels, first;

  template <class V, int U> inline void run(Int c) {
    const V f = load<V>(stats + 2 * from_channels + first + c);
    const V s = load<V>(stats + 3 * from_channels + first + c);
    for (Int n = 0; n < pixels; ++n) {
      const V x = load<V>(from + n * from_channels + first + c);
      store<V>(to + n * to_channels + c, activate<ACT>(V(x * f + s)));
    }
  }
};

// `count` channels from `first` on of an image's pixels.
template <class M, class R>
static void take(const M* from, Before<R> before, R* to, Int pixels, Int channels, Int first,
                 Int count) {
  // Some pixels at a time, while their lines are in the cache.
  for (Int n = 0; n < pixels && before.stats; n += 16) {
    const Int some = std::min<Int>(16, pixels - n);
    const M* x = from + n * channels;
    R* y = to + n * count;
    if (before.act == RELU) {
      Taken<M, R, RELU> taken = {x, before.stats, y, some, channels, count, first};
      channel_blocks<R, 1>(0, count, taken);
    } else if (before.act == RELU6) {
      Taken<M, R, RELU6> taken = {x, before.stats, y, some, channels, count, first};
      channel_blocks<R, 1>(0, count, taken);
    } else {
      Taken<M, R, NONE> taken = {x, before.stats, y, some, channels, count, first};
      channel_blocks<R, 1>(0, count, taken);
    }
  }
  if (before.stats) return;
  if (count == channels) return convert(from, to, pixels * channels);
  for (Int n = 0; n < pixels; ++n) convert(from + n * channels + first, to + n * count, count);
}

// A kernel's weights (C, taps) as rows of C, and back.
template <class R> static void transpose(const R* from, R* to, Int rows, Int columns) {
  for (Int r = 0; r < rows; ++r)
    for (Int c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

template <class R, class M> struct Pixel {
  const R *source, *weight;
  const M* plus;
  M* target;
  const std::vector<Tap>*rows, *columns;
  Int row_stride, channels, kernel;

  template <class V, int U> inline void run(Int c) {
    const Int lanes = sizeof(V) / sizeof(R);
    V sum[U];
    for (int u = 0; u < U; ++u) sum[u] = plus ? load<V>(plus + c + u * lanes) : V{};
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
  const M* plus;
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
        if (plus) sum += load<V>(plus + c + x * channels);
        for (int k = 1; k < K * K; ++k) sum += load<V>(line[k] + x * step) * w[k];
        store<V>(out + x * channels, sum);
      }
    }
  }
};

// source (batch, height, width, C), weight (C, kernel, kernel) to target (batch, out_height,
// out_width, C), to which `plus` is added where it is not null: it may be the target. Of maps in
// fewer digits, or behind a norm, the rows that a strip of the output reads are made first, once
// for all taps.
template <class M, class R>
static void depthwise(const M* source, Before<R> before, const R* kernels, const M* plus, M* target,
                      Int batch, Int height, Int width, Int out_height, Int out_width, Int channels,
                      Int kernel, Int stride, Int dilation, Int top, Int left, Int transposed) {
  std::vector<R> by_tap(kernel * kernel * channels);
  transpose(kernels, by_tap.data(), channels, kernel * kernel);
  const R* weight = by_tap.data();
  auto rows = taps_of(out_height, height, kernel, stride, dilation, top, transposed);
  auto columns = taps_of(out_width, width, kernel, stride, dilation, left, transposed);
  const bool same = std::is_same<M, R>::value && !before.stats;
  const Int strip = same ? 1 : 8, strips = (out_height + strip - 1) / strip;
  const Int line = width * channels;
  // Pixels of a row that have all taps.
  Int inner = 0, after = 0;
  while (inner < out_width && (Int)columns[inner].size() < kernel) ++inner;
  for (after = inner; after < out_width && (Int)columns[after].size() == kernel;) ++after;
#pragma omp parallel
  {
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
          R* converted = room<R, 0>(std::max<Int>(1, (last - first) * line));
          if (last > first)
            take(image + first * line, before, converted, (last - first) * width, channels, 0,
                 channels);
          read = converted - first * line;
        }
        for (Int y = n * strip; y < end; ++y) {
          const Int begin = (b * out_height + y) * out_width * channels;
          M* out = target + begin;
          const M* added = plus ? plus + begin : nullptr;
          const bool whole = inner < after && (Int)rows[y].size() == kernel;
          const auto run_row = [&](auto size) {
            Run<R, M, size> run = {read, weight, added ? added + inner * channels : nullptr,
                                   out + inner * channels, rows[y], columns, line, channels,
                                   inner, after};
            channel_blocks<R, 1>(0, channels, run);
          };
          if (whole && kernel == 3) run_row(std::integral_constant<int, 3>());
          if (whole && kernel == 5) run_row(std::integral_constant<int, 5>());
          const bool done = whole && (kernel == 3 || kernel == 5);
          Pixel<R, M> pixel = {read,    weight, nullptr,  nullptr, &rows[y],
                               nullptr, line,   channels, kernel};
          for (Int x = 0; x < out_width; ++x) {
            if (done && x >= inner && x < after) continue;
            pixel.columns = &columns[x];
            pixel.target = out + x * channels;
            pixel.plus = added ? added + x * channels : nullptr;
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

// The gradient of the weight (C, kernel, kernel), from the input and the output's gradient. Of maps
// in fewer digits, or behind a norm, an image's block of channels is made first, once for all taps.
template <class M, class R>
static void depthwise_weight(const M* source, Before<R> before, const M* slope, R* gradient,
                             Int batch, Int height, Int width, Int out_height, Int out_width,
                             Int channels, Int kernel, Int stride, Int dilation, Int top,
                             Int left) {
  const bool same = std::is_same<M, R>::value && !before.stats;
  const Int pieces = std::min<Int>(batch, 4), block = same ? 128 : channels < 48 ? channels : 32;
  const Int size = kernel * kernel * channels, blocks = (channels + block - 1) / block;
  const Int area = height * width, out_area = out_height * out_width;
  std::vector<R> sums(pieces * size, R(0));
#pragma omp parallel
  {
    std::vector<R> own_sums;
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
        R *own_source = room<R, 0>(area * count), *own_slope = room<R, 1>(out_area * count);
        own_sums.assign(kernel * kernel * count, R(0));
        piece.source = own_source;
        piece.slope = own_slope;
        piece.sums = own_sums.data();
        piece.from = 0;
        piece.to = 1;
        piece.channels = count;
        for (Int b = from; b < to; ++b) {
          take(source + b * area * channels, before, own_source, area, channels, first,
               count);
          take(slope + b * out_area * channels, Before<R>{nullptr, NONE}, own_slope,
               out_area, channels, first, count);
          channel_blocks<R, 4>(0, count, piece);
        }
        for (Int i = 0; i < kernel * kernel; ++i)
          for (Int c = 0; c < count; ++c)
            sums[p * size + i * channels + first + c] = own_sums[i * count + c];
      }
  }
  for (Int i = 0; i < size; ++i) {
    for (Int p = 1; p < pieces; ++p) sums[i] += sums[p * size + i];
  }
  transpose(sums.data(), gradient, kernel * kernel, channels);
}
