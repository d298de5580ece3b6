// Integers with a scale for each group of inputs (grouped.cpp), multiplied as integers.
//
// Products and their sums are exact, so it is for each group of inputs alone that a row's sum is rounded. What the
// inputs of a row are rounded to (integer_rows.h) leaves off 2^-31 of the largest that shares their scales.

#include "integer_rows.h"

ISO_INLINE vi add_products(vi sum, vi weight, vi x) { return sum + (vi)_mm256_madd_epi16((__m256i)weight, (__m256i)x); }
ISO_INLINE vf to_floats(vi v) { return (vf)_mm256_cvtepi32_ps((__m256i)v); }

// Adds a row's sum, of its upper halves' and its lower halves', × both scales to what it has.
ISO_INLINE void add_sum(float* to, vi high, const float* low, vf scale, const RowScale& row) {
  const vf sum = fma(to_floats(high), set(1 << kHalfBits), load(low));
  store(to, fma(sum, scale * set(row.scale), load(to)));
}

alignas(64) constexpr float kNoSums[kTile] = {};

// Sums of the lower halves of R rows against a tile's words that share scales: `row[r]`, 32 of them.
template <int R>
struct LowerSums {
  alignas(64) float sums[R * kTile];
  const float* row[R];

  // Entries `first` to `last` of the group's. `word(i, out)` gives word i of the tile, 32 outputs; `points(v)` what is
  // to be taken from those of vector v.
  template <class Word, class Points>
  ISO_INLINE_MEMBER void make(const Group& group, int32_t first, int32_t last, const RowScale* scales, const Word& word,
                              const Points& points) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) row[r] = kNoSums;
    for (int32_t e = first; e < last;) {
      const int r = R == 1 ? 0 : group.low[e].row;
      vi part[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) part[v] = -points(v) * scales[r].low;
      do {
        const vi input = set_word(group.low[e].value);
        vi w[kTileVectors];
        word(group.low[e].word, w);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) part[v] = add_products(part[v], w[v], input);
        ++e;
      } while (e < last && (R == 1 || group.low[e].row == r));
      float* to = sums + r * kTile;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) store(to + v * W, to_floats(part[v]));
      row[r] = to;
    }
  }
};

ISO_INLINE vf scale_vector(const Linear& weight, const uint8_t* block, int v) {
  const uint8_t* scales = block + weight.code_bytes;
  return weight.grouping.scale_bytes == 4 ? load(reinterpret_cast<const float*>(scales) + v * W)
                                          : load_bf16_vector(reinterpret_cast<const uint16_t*>(scales) + v * W);
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
  const int32_t* low_begin = group.low_begin;
  LowerSums<R> lower;
  for (int i = 0; i < R * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0; begin < weight.words; begin += group_words, block += weight.block_bytes, scales += R) {
    const int64_t n = least(group_words, weight.words - begin);
    const uint8_t* ahead = block + kPrefetchWords * 4;
    if (ahead >= end_of_tile) ahead = next + (ahead - end_of_tile);
    for (int64_t i = 0; i < weight.block_bytes; i += 64) prefetch(ahead + i);
    const auto word_at = [block](int at, vi* out) ISO_ATTR {
      const uint8_t* of = block + at / D::kWords * 64;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        vi w[2];
        if (at % D::kWords == 0) {
          D::decode(of + half * 32, 0, w);
        } else {
          D::decode(of + half * 32, 1, w);
        }
        out[half] = w[0], out[half + 2] = w[1];
      }
    };
    const auto points_at = [&weight, block](int v) ISO_ATTR { return points_of<D>(weight, block, v); };
    lower.make(group, low_begin[0], low_begin[1], scales, word_at, points_at);
    ++low_begin;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vi part[R][2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const vi points = points_of<D>(weight, block, half + 2 * v);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) part[r][v] = -points * scales[r].high;
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
      for (; u + D::kWords <= n; u += D::kWords, codes += 64) {
#pragma GCC unroll 2
        for (int i = 0; i < D::kWords; ++i, a += R) {
          D::decode(codes, i, w);
          add(w, a);
        }
      }
      if (u < n) {
        D::decode(codes, 0, w);
        add(w, a);
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int at = (half + 2 * v) * W;
        const vf scale = scale_vector(weight, block, half + 2 * v);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) add_sum(sums + r * kTile + at, part[r][v], lower.row[r] + at, scale, scales[r]);
      }
    }
  }
}

// R rows against words [begin, begin + n) of a decoded tile, which are group `part` of their inputs.
template <int R>
static void integer_rows(const uint32_t* words, const Group& group, int64_t begin, int64_t n, int64_t part,
                         const float* scales, float* sums) {
  const RowScale* row_scales = group.scales + part * R;
  const auto word_at = [words](int at, vi* out) ISO_ATTR {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) out[v] = load_words(words + at * kTile + v * W);
  };
  LowerSums<R> lower;
  lower.make(group, group.low_begin[part], group.low_begin[part + 1], row_scales, word_at,
             [](int) ISO_ATTR { return set_word(0); });
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
      for (int r = 0; r < R; ++r) add_sum(sums + r * kTile + at, sum[r][v], lower.row[r] + at, scale, row_scales[r]);
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
      const uint8_t *codes = block + u / D::kWords * 64, *ahead = codes + kPrefetchWords * 4;
      prefetch(ahead < end_of_tile ? ahead : next + (ahead - end_of_tile));
#pragma GCC unroll 2
      for (int i = 0; i < D::kWords; ++i) {  // a word that is one too many has its place
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
