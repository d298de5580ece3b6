// FP8 weights: sums of 128 inputs apart, then added with the block's scale.

#if ISO_W == 8
#include "fp8_direct.h"
#else
template <class M>
ISO_INLINE void enlarge(const Linear&, Group&) {}

// Decoded in registers, for a tile that is used by few groups: weights cross the caches as bytes.
template <int R>
ISO_INLINE void fp8_tile(const uint8_t* codes, const float* scales, int64_t words, const uint32_t* a, int64_t a_stride,
                         float* sums, const uint8_t* next) {
  const Fp8Decoder decoder = Fp8Decoder::make();
  for (int i = 0; i < R * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0; begin < words; begin += kScaleWords) {
    const int64_t end = least(begin + kScaleWords, words);
    RowSums<R> own;
    const int64_t beyond =
        begin * 64 + kPrefetchWords * 4 - words * 64;  // how far past the tile's end the stream is prefetched
    const uint8_t* ahead = beyond < 0 ? codes + kPrefetchWords * 4 : next + beyond;
    for (int64_t u = begin; u < end; ++u) {
      vi weight[kTileVectors];
      decoder.decode(codes, 0, weight);
      prefetch(ahead);
      codes += 64;
      ahead += 64;
      own.add(weight, a);
      a += kRowWords<Bf16> * a_stride;
    }
    vf scale[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) scale[v] = set(*scales);
    ++scales;
    own.add_scaled(sums, scale);
  }
}

// The same for one row and two tiles at once.
static void fp8_two(const Linear& weight, const Strip (&strips)[2], const uint32_t* a, int64_t a_stride) {
  const Fp8Decoder decoder = Fp8Decoder::make();
  const uint8_t* codes[] = {weight.tile(strips[0].tile), weight.tile(strips[1].tile)};
  for (int i = 0; i < kTile; i += W) store(strips[0].sums + i, set(0.0f)), store(strips[1].sums + i, set(0.0f));
  for (int64_t begin = 0; begin < weight.words; begin += kScaleWords) {
    const int64_t end = least(begin + kScaleWords, weight.words);
    const int64_t beyond = (begin - weight.words) * 64 + kPrefetchWords * 4;
    const uint8_t* ahead[2];
    RowSums<1> own[2];
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) ahead[t] = beyond < 0 ? codes[t] + kPrefetchWords * 4 : strips[t].next + beyond;
    for (int64_t u = begin; u < end; ++u) {
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) {
        vi word[kTileVectors];
        decoder.decode(codes[t], 0, word);
        prefetch(ahead[t]);
        codes[t] += 64, ahead[t] += 64;
        own[t].add(word, a);
      }
      a += kRowWords<Bf16> * a_stride;
    }
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      vf scale[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v)
        scale[v] = set(weight.scales[strips[t].tile * weight.scale_blocks + begin / kScaleWords]);
      own[t].add_scaled(strips[t].sums, scale);
    }
  }
}

static void fp8_group(const uint8_t* codes, const float* scales, int64_t words, const Group& g, float* sums,
                      const uint8_t* next) {
  switch (g.rows) {
#define ISO_CASE(R)                                                         \
  case R:                                                                   \
    fp8_tile<R>(codes, scales, words, g.words, word_stride(g), sums, next); \
    break;
    ISO_DIRECT_ROWS(ISO_CASE)
#undef ISO_CASE
    default:
      break;
  }
}
#endif

template <class M>
static void fp8_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                         const uint8_t* next) {
  const int64_t words = weight.words, base = groups[0].first;
  const uint8_t* tile = weight.tile(t);
  const float* scales = weight.scales + t * weight.scale_blocks;
#if ISO_W == 8
  if (kRowWords<M> == 2 && count == 1) return fp8_few(tile, scales, words, groups[0], sums, next);
#else
  if (direct<M>(groups, count)) {
    for (int64_t g = 0; g < count; ++g)
      fp8_group(tile, scales, words, groups[g], sums + (groups[g].first - base) * kTile, next);
    return;
  }
#endif
  const Fp8Decoder decoder = Fp8Decoder::make();
  alignas(64) uint32_t decoded[kDecodedWords * kTile];
  alignas(64) float scale[kBlockWords / kScaleWords * kTile];
  const int64_t rows = groups[count - 1].first + groups[count - 1].rows - base;
  for (int64_t i = 0; i < rows * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0; begin < words; begin += kBlockWords) {
    const int64_t n = least(kBlockWords, words - begin);
    for (int64_t u = 0; u < n; ++u) {
      vi word[kTileVectors];
      decoder.decode(tile + (begin + u) * 64, 0, word);
      const int64_t ahead = (begin + u) * 64 + 4 * kPrefetchWords, beyond = ahead - words * 64;
      prefetch_block(beyond < 0 ? tile + ahead : next + beyond);
      keep_word(decoded, u, word);
    }
    for (int64_t u = 0; u < n; u += kScaleWords, ++scales) {
      for (int o = 0; o < kTile; o += W) store(scale + u / kScaleWords * kTile + o, set(*scales));
    }
    constexpr int kEach = kRowWords<M>;
    multiply_scaled<Decoded<M>>(decoded, groups, count, kEach * begin, kEach * n, kEach * kScaleWords, sums, scale);
  }
}
