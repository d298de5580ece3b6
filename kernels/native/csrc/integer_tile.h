// Integers with a scale for each group of inputs (grouped.cpp), multiplied as integers: products and their sums are
// exact, so it is for each group of inputs alone that a row's sum is rounded, and what its inputs are rounded to
// (integer_rows.h).

#include "integer_rows.h"

ISO_INLINE vi add_products(vi sum, vi weight, vi x) { return sum + (vi)_mm256_madd_epi16((__m256i)weight, (__m256i)x); }
ISO_INLINE vf to_floats(vi v) { return (vf)_mm256_cvtepi32_ps((__m256i)v); }

// Adds a row's sum × both scales to what it has.
ISO_INLINE void add_sum(float* to, vi sum, vf scale, const RowScale& row) {
  store(to, fma(to_floats(sum), scale * set(row.scale), load(to)));
}

ISO_INLINE vf scale_vector(const Linear& weight, const uint8_t* block, int v) {
  return load_scales(weight.grouping, block + weight.code_bytes, v);
}

// Zero points of vector v, where there are some.
template <class D>
ISO_INLINE vi points_of(const Linear& weight, const uint8_t* block, int v) {
  return D::points(block + weight.code_bytes + kTile * weight.grouping.scale_bytes, v);
}

// R rows against a tile that is decoded in registers, half of it at a time.
template <class D, int R>
static void integer_direct(const Linear& weight, const uint8_t* block, const Group& group, float* sums,
                           const uint8_t* next) {
  const int64_t group_words = weight.grouping.inputs / 2;
  const uint8_t* end_of_tile = block + weight.tile_bytes;
  const RowScale* scales = group.scales;
  for (int i = 0; i < R * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0; begin < weight.words; begin += group_words, block += weight.block_bytes, scales += R) {
    const int64_t n = least(group_words, weight.words - begin);
    const uint8_t* ahead = block + kPrefetchWords * 4;
    if (ahead >= end_of_tile) ahead = next + (ahead - end_of_tile);
    for (int64_t i = 0; i < weight.block_bytes; i += 64) prefetch(ahead + i);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vi part[R][2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const vi points = points_of<D>(weight, block, half + 2 * v);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) part[r][v] = -points * scales[r].sum;
      }
      const uint8_t* codes = block + half * 32;
      const uint32_t* a = group.words + begin * R;
      const auto add = [&](const vi* w, const uint32_t* x) ISO_ATTR {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const vi input = set_word(load_word(x + r));
          part[r][0] = add_products(part[r][0], w[0], input);
          part[r][1] = add_products(part[r][1], w[1], input);
        }
      };
      int64_t u = 0;
      vi w[2];
      for (; u + D::kWords <= n; u += D::kWords, codes += D::kBytes) {
#pragma GCC unroll 4
        for (int i = 0; i < D::kWords; ++i, a += R) {
          D::decode(codes, i, w);
          add(w, a);
        }
      }
      for (int i = 0; u < n; ++u, ++i, a += R) {
        D::decode(codes, i, w);
        add(w, a);
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int at = (half + 2 * v) * W;
        const vf scale = scale_vector(weight, block, half + 2 * v);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) add_sum(sums + r * kTile + at, part[r][v], scale, scales[r]);
      }
    }
  }
}

// R rows against words [begin, begin + n) of a decoded tile, which are group `part` of their inputs.
template <int R>
static void integer_rows(const uint32_t* words, const Group& group, int64_t begin, int64_t n, int64_t part,
                         const float* scales, float* sums) {
  const RowScale* row_scales = group.scales + part * R;
  for (int o = 0; o < kTile; o += 2 * W) {
    vi sum[R][2] = {};
    const uint32_t *w = words + o, *a = group.words + begin * R;
    for (int64_t u = 0; u < n; ++u, w += kTile, a += R) {
      const vi weight[] = {load_words(w), load_words(w + W)};
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const vi input = set_word(load_word(a + r));
        sum[r][0] = add_products(sum[r][0], weight[0], input);
        sum[r][1] = add_products(sum[r][1], weight[1], input);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int at = o + v * W;
      const vf scale = load(scales + at);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) add_sum(sums + r * kTile + at, sum[r][v], scale, row_scales[r]);
    }
  }
}

// Decoded once for all rows, the words that share scales at a time.
template <class D>
static void integer_blocks(const Linear& weight, const uint8_t* block, const Group* groups, int64_t count, float* sums,
                           const uint8_t* next) {
  const int64_t group_words = weight.grouping.inputs / 2, base = groups[0].first;
  const uint8_t* end_of_tile = block + weight.tile_bytes;
  alignas(64) uint32_t decoded[kBlockWords * kTile];
  alignas(64) float scales[kTile];
  const int64_t rows = groups[count - 1].first + groups[count - 1].rows - base;
  for (int64_t i = 0; i < rows * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0, part = 0; begin < weight.words; begin += group_words, block += weight.block_bytes, ++part) {
    const int64_t n = least(group_words, weight.words - begin);
    vi points[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      store(scales + v * W, scale_vector(weight, block, v));
      points[v] = points_of<D>(weight, block, v);
      points[v] = points[v] | points[v] << 16;
    }
    for (int64_t u = 0; u < n; u += D::kWords) {
      const uint8_t* codes = block + u / D::kWords * D::kBytes;
#pragma GCC unroll 3
      for (int i = 0; i < D::kBytes; i += 64) {
        const uint8_t* ahead = codes + i + kPrefetchWords * 4;
        prefetch(ahead < end_of_tile ? ahead : next + (ahead - end_of_tile));
      }
#pragma GCC unroll 4
      for (int i = 0; i < D::kWords; ++i) {  // words that are too many have their place
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          vi w[2];
          D::decode(codes + half * 32, i, w);
          uint32_t* to = decoded + (u + i) * kTile + half * W;
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const __m256i less = _mm256_sub_epi16((__m256i)w[v], (__m256i)points[half + 2 * v]);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + v * 2 * W), less);
          }
        }
      }
    }
    for (int64_t g = 0; g < count; ++g) {
      float* to = sums + (groups[g].first - base) * kTile;
      switch (groups[g].rows) {
#define ISO_CASE(R)                                                  \
  case R:                                                            \
    integer_rows<R>(decoded, groups[g], begin, n, part, scales, to); \
    break;
        ISO_CASE(1)
        ISO_CASE(2)
        ISO_CASE(3)
        ISO_CASE(4)
        ISO_CASE(5)
        ISO_CASE(6)
#undef ISO_CASE
        default:
          break;
      }
    }
  }
}

template <class D>
static void integer_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                             const uint8_t* next) {
  const uint8_t* tile = weight.tile(t);
  switch (count == 1 ? groups[0].rows : 0) {
#define ISO_CASE(R) \
  case R:           \
    return integer_direct<D, R>(weight, tile, groups[0], sums, next);
    ISO_CASE(1)
    ISO_CASE(2)
    ISO_CASE(3)
    ISO_CASE(4)
    ISO_CASE(5)
    ISO_CASE(6)
#undef ISO_CASE
    default:
      return integer_blocks<D>(weight, tile, groups, count, sums, next);
  }
}

template <class M>
static void int4_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  if (weight.grouping.zeros != 0) {
    integer_multiply<Int4Decoder<true>>(weight, t, groups, count, sums, next);
  } else {
    integer_multiply<Int4Decoder<false>>(weight, t, groups, count, sums, next);
  }
}

template <class M>
static void int8_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  integer_multiply<Int8Decoder>(weight, t, groups, count, sums, next);
}

template <class M>
static void int6_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  integer_multiply<Int6Decoder>(weight, t, groups, count, sums, next);
}
