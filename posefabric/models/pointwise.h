// 1x1 convolutions of bfloat16 maps as matrix products on AMX tiles, and their gradients.

#pragma once

#include <algorithm>
#include <vector>

#include "lanes.h"
#include "room.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

// A tile has 16 rows of 64 bytes: 16 floats, or 32 values in bfloat16. Blocks are two by two tiles.
const Int TILE = 16, SIDE = 2 * TILE;

static inline Int blocks_of(Int size) { return (size + SIDE - 1) / SIDE; }

#if HAS_TILES

// Linux gives the tiles to processes that ask for them.
static bool tiles_granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Full tiles inside, and the configuration that was before outside.
class Tiles {
  alignas(64) unsigned char before[64];

 public:
  Tiles() {
    _tile_storeconfig(before);
    alignas(64) unsigned char own[64] = {1};
    for (int t = 0; t < 8; ++t) {
      own[16 + 2 * t] = 64;
      own[48 + t] = TILE;
    }
    _tile_loadconfig(own);
  }
  ~Tiles() {
    if (before[0])
      _tile_loadconfig(before);
    else
      _tile_release();
  }
};

// Two rows of 16 values each as 16 pairs.
static inline __m512i pairs(const unsigned short* first, const unsigned short* second) {
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

// 16 rows of 16 words, rows for columns.
static inline void transpose_words(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // r[4 i + j] has column 4 q + j of rows 4 i .. 4 i + 3 in its quarter q.
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// 16 floats from `p` on, of which `inside` are there.
static inline __m512 some_of(const float* p, Int inside) {
  const __mmask16 mask = inside >= TILE ? 0xffff : inside > 0 ? (1 << inside) - 1 : 0;
  return _mm512_maskz_loadu_ps(mask, p);
}

// The right factor (depth, width) for a product over `depth`: blocks of width, then of depth, of
// two tiles each whose rows are pairs of depth; zeros behind. It lies as (depth, width), or as its
// transpose.
static void pack_right(const float* from, Int depth, Int width, bool transposed,
                       unsigned short* to) {
  const Int deep = blocks_of(depth), wide = blocks_of(width);
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma omp parallel for schedule(static)
  for (Int tile = 0; tile < wide * 2; ++tile)
    for (Int d = 0; d < deep; ++d) {
      const Int column = tile * TILE, row = d * SIDE;
      __m512i found[TILE];
      for (Int i = 0; i < TILE; ++i) {
        __m512 low = _mm512_setzero_ps(), high = low;
        if (transposed && column + i < width) {
          const float* line = from + (column + i) * depth + row;
          low = some_of(line, depth - row);
          high = some_of(line + TILE, depth - row - TILE);
        } else if (!transposed) {
          const float* line = from + (row + 2 * i) * width + column;
          if (row + 2 * i < depth) low = some_of(line, width - column);
          if (row + 2 * i + 1 < depth) high = some_of(line + width, width - column);
        }
        found[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        if (!transposed) found[i] = _mm512_permutexvar_epi16(zip, found[i]);
      }
      if (transposed) transpose_words(found);
      unsigned short* own = to + (tile / 2 * deep + d) * SIDE * SIDE + tile % 2 * TILE * SIDE;
      for (Int i = 0; i < TILE; ++i) _mm512_storeu_si512(own + i * SIDE, found[i]);
    }
}

// Some rows of a map, at least one block of 32 by 32 values in reach of every place: as they lie,
// or copied, with zeros behind, where a block would reach over an end.
struct Left {
  const unsigned short* rows;
  Int stride;
};

static Left left_rows(const Bf16* x, Int rows, Int channels) {
  const Int wide = blocks_of(channels) * SIDE;
  if (rows == SIDE && wide == channels)
    return {reinterpret_cast<const unsigned short*>(x), channels};
  unsigned short* copy = room<unsigned short, 2>(SIDE * wide);
  for (Int r = 0; r < SIDE; ++r) {
    const Int kept = r < rows ? channels : 0;
    if (kept) __builtin_memcpy(copy + r * wide, x + r * channels, kept * sizeof(Bf16));
    std::fill(copy + r * wide + kept, copy + (r + 1) * wide, 0);
  }
  return {copy, wide};
}

// Of 32 values in bfloat16 at `p`, those of the mask, as floats.
static inline void widen(const Bf16* p, __mmask32 inside, __m512* low, __m512* high) {
  const __m512i both = _mm512_maskz_loadu_epi16(inside, p);
  const auto first = _mm512_castsi512_si256(both), second = _mm512_extracti64x4_epi64(both, 1);
  *low = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16);
  *high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
}

// To the tiles 0 to 3, the product of a block of two by one tiles, in rows of `stride`, and a packed
// one of one by two.
static inline void add_product(const unsigned short* left, Int stride,
                               const unsigned short* right) {
  _tile_loadd(4, left, 2 * stride);
  _tile_loadd(5, left + TILE * stride, 2 * stride);
  _tile_loadd(6, right, 64);
  _tile_loadd(7, right + TILE * SIDE, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// y (rows, width) = x (rows, depth) times the packed right factor, plus `bias` (width) and `plus`
// (rows, width) where there are any.
static void product(const Bf16* x, const unsigned short* right, const float* bias,
                    const Bf16* plus, Bf16* y, Int rows, Int depth, Int width) {
  const Int deep = blocks_of(depth), wide = blocks_of(width), blocks = blocks_of(rows);
#pragma omp parallel
  {
    Tiles tiles;
    alignas(64) float sums[SIDE * SIDE];
#pragma omp for schedule(static)
    for (Int block = 0; block < blocks; ++block) {
      const Int first = block * SIDE, count = std::min(SIDE, rows - first);
      const Left left = left_rows(x + first * depth, count, depth);
      for (Int b = 0; b < wide; ++b) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (Int d = 0; d < deep; ++d) {
          const unsigned short* own = right + (b * deep + d) * SIDE * SIDE;
          add_product(left.rows + d * SIDE, left.stride, own);
        }
        _tile_stored(0, sums, SIDE * 4);
        _tile_stored(1, sums + TILE, SIDE * 4);
        _tile_stored(2, sums + TILE * SIDE, SIDE * 4);
        _tile_stored(3, sums + TILE * SIDE + TILE, SIDE * 4);
        const Int columns = std::min(SIDE, width - b * SIDE);
        const __mmask32 inside = columns == SIDE ? ~__mmask32(0) : (__mmask32(1) << columns) - 1;
        const __mmask16 low = inside & 0xffff, high = inside >> 16;
        const __m512 none = _mm512_setzero_ps();
        const __m512 bias_low = bias ? _mm512_maskz_loadu_ps(low, bias + b * SIDE) : none;
        const __m512 bias_high = bias ? _mm512_maskz_loadu_ps(high, bias + b * SIDE + TILE) : none;
        for (Int r = 0; r < count; ++r) {
          const Int at = (first + r) * width + b * SIDE;
          __m512 a = _mm512_add_ps(_mm512_load_ps(sums + r * SIDE), bias_low);
          __m512 c = _mm512_add_ps(_mm512_load_ps(sums + r * SIDE + TILE), bias_high);
          if (plus) {
            __m512 more_low, more_high;
            widen(plus + at, inside, &more_low, &more_high);
            a = _mm512_add_ps(a, more_low);
            c = _mm512_add_ps(c, more_high);
          }
          _mm512_mask_storeu_epi16(y + at, inside, (__m512i)_mm512_cvtne2ps_pbh(c, a));
        }
      }
    }
  }
}

// 32 pixels as tiles of 16 channels: pairs of pixels by channel, or, transposed, channels by pixel.
static void pixel_tiles(Left left, Int channels, bool transposed, unsigned short* to) {
  for (Int c = 0; c < blocks_of(channels) * 2; ++c) {
    __m512i r[16];
    for (int p = 0; p < 16; ++p) {
      const unsigned short* row = left.rows + 2 * p * left.stride + c * TILE;
      r[p] = pairs(row, row + left.stride);
    }
    if (transposed) transpose_words(r);
    for (int p = 0; p < 16; ++p)
      _mm512_storeu_si512(to + (c * TILE + p) * SIDE, r[p]);
  }
}

// dw (width, depth) = g (rows, width) transposed times x (rows, depth).
static void product_back(const Bf16* x, const Bf16* g, float* dw, Int rows, Int depth, Int width) {
  const Int deep = blocks_of(depth), wide = blocks_of(width), size = deep * wide * SIDE * SIDE;
  // Pieces of pixels, whatever the number of threads, and in each some at a time.
  const Int pieces = std::max<Int>(1, std::min<Int>(4, rows / 256));
  const Int some = std::max<Int>(1, std::min<Int>(16, 512 / (deep + wide)));
  std::vector<float> sums(pieces * size, 0.0f);
#pragma omp parallel
  {
    Tiles tiles;
    const Int left_size = wide * SIDE * SIDE, right_size = deep * SIDE * SIDE;
    unsigned short* lefts = room<unsigned short, 3>(some * left_size);
    unsigned short* rights = room<unsigned short, 4>(some * right_size);
#pragma omp for schedule(static)
    for (Int p = 0; p < pieces; ++p) {
      const Int blocks = blocks_of(rows), last = blocks * (p + 1) / pieces;
      float* own = sums.data() + p * size;
      for (Int begin = blocks * p / pieces; begin < last; begin += some) {
        const Int count = std::min(some, last - begin);
        for (Int i = 0; i < count; ++i) {
          const Int first = (begin + i) * SIDE, inside = std::min(SIDE, rows - first);
          pixel_tiles(left_rows(g + first * width, inside, width), width, true,
                      lefts + i * left_size);
          pixel_tiles(left_rows(x + first * depth, inside, depth), depth, false,
                      rights + i * right_size);
        }
        for (Int w = 0; w < wide; ++w)
          for (Int d = 0; d < deep; ++d) {
            float* block = own + (w * deep + d) * SIDE * SIDE;
            _tile_loadd(0, block, 64);
            _tile_loadd(1, block + TILE * TILE, 64);
            _tile_loadd(2, block + 2 * TILE * TILE, 64);
            _tile_loadd(3, block + 3 * TILE * TILE, 64);
            for (Int i = 0; i < count; ++i) {
              const unsigned short* a = lefts + i * left_size + w * SIDE * SIDE;
              const unsigned short* b = rights + i * right_size + d * SIDE * SIDE;
              add_product(a, SIDE, b);
            }
            _tile_stored(0, block, 64);
            _tile_stored(1, block + TILE * TILE, 64);
            _tile_stored(2, block + 2 * TILE * TILE, 64);
            _tile_stored(3, block + 3 * TILE * TILE, 64);
          }
      }
    }
  }
#pragma omp parallel for schedule(static)
  for (Int w = 0; w < width; ++w)
    for (Int d = 0; d < depth; d += TILE) {
      const Int block = w / SIDE * deep + d / SIDE, tile = w % SIDE / TILE * 2 + d % SIDE / TILE;
      const Int at = ((block * 4 + tile) * TILE + w % TILE) * TILE;
      float* to = dw + w * depth + d;
      for (Int i = 0; i < std::min(TILE, depth - d); ++i) {
        float sum = 0;
        for (Int p = 0; p < pieces; ++p) sum += sums[p * size + at + i];
        to[i] = sum;
      }
    }
}

#endif

// Where there are tiles: x (rows, in) by weight (out, in) to y (rows, out). Transposed, x has `out`
// channels and y `in`: the gradient of the input.
static void pointwise(const Bf16* x, const float* weight, const float* bias, const Bf16* plus,
                      Bf16* y, Int rows, Int in, Int out, Int transposed) {
#if HAS_TILES
  const Int depth = transposed ? out : in, width = transposed ? in : out;
  unsigned short* right =
      room<unsigned short, 5>(blocks_of(depth) * blocks_of(width) * SIDE * SIDE);
  pack_right(weight, depth, width, !transposed, right);
  product(x, right, bias, plus, y, rows, depth, width);
#endif
}

static void pointwise_weight(const Bf16* x, const Bf16* g, float* dw, Int rows, Int in, Int out) {
#if HAS_TILES
  product_back(x, g, dw, rows, in, out);
#endif
}
