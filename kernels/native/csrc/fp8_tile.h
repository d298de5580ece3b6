// FP8 weights: sums of 128 inputs apart, then added with the block's scale.

#if ISO_W == 16
// FP8 decoded in registers, for a tile that is used by few groups: weights cross the caches as bytes.
template <int R>
ISO_INLINE void fp8_tile(const uint8_t* codes, const float* scales, int64_t words, const uint32_t* a, int64_t a_stride,
                         float* sums, const uint8_t* next) {
  const Fp8Decoder decoder = Fp8Decoder::make();
  for (int r = 0; r < R * 2; ++r) store(sums + r * W, set(0.0f));
  for (int64_t begin = 0; begin < words; begin += kScaleWords) {
    const int64_t end = least(begin + kScaleWords, words);
    vf c[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = set(0.0f);
    const int64_t beyond =
        begin * 64 + kPrefetchWords * 4 - words * 64;  // how far past the tile's end the stream is prefetched
    const uint8_t* ahead = beyond < 0 ? codes + kPrefetchWords * 4 : next + beyond;
    for (int64_t u = begin; u < end; ++u) {
      vi weight[2];
      decoder.decode(codes, weight);
      prefetch(ahead);
      codes += 64;
      ahead += 64;
      add_word<R>(c, weight, a);
      a += a_stride;
    }
    const vf scale = set(*scales++);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store(sums + r * kTile, fma(c[r][0], scale, load(sums + r * kTile)));
      store(sums + r * kTile + W, fma(c[r][1], scale, load(sums + r * kTile + W)));
    }
  }
}

static void fp8_group(const uint8_t* codes, const float* scales, int64_t words, const Group& g, float* sums,
                      const uint8_t* next) {
  switch (g.rows) {
#define ISO_CASE(R)                                                   \
  case R:                                                             \
    fp8_tile<R>(codes, scales, words, g.words, g.stride, sums, next); \
    break;
    ISO_CASE(1)
    ISO_CASE(2)
    ISO_CASE(3)
    ISO_CASE(4)
    ISO_CASE(5)
    ISO_CASE(6)
    ISO_CASE(7)
    ISO_CASE(8)
    ISO_CASE(9)
    ISO_CASE(10)
    ISO_CASE(11)
    ISO_CASE(12)
#undef ISO_CASE
    default:
      break;
  }
}
#else
static void fp8_group(const uint8_t*, const float*, int64_t, const Group&, float*, const uint8_t*) {}
#endif

template <class M>
static void fp8_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                         const uint8_t* next) {
  const int64_t words = weight.words, base = groups[0].first;
  const uint8_t* tile = weight.tile(t);
  const float* scales = weight.scales + t * weight.scale_blocks;
  if (kDirectFp8 && count <= 3) {  // beyond that, decoding once for all groups pays
    for (int64_t g = 0; g < count; ++g)
      fp8_group(tile, scales, words, groups[g], sums + (groups[g].first - base) * kTile, next);
    return;
  }
  alignas(64) uint32_t decoded[kScaleWords * kTile];
  const int64_t rows = groups[count - 1].first + groups[count - 1].rows - base;
  for (int64_t i = 0; i < rows * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0, b = 0; begin < words; begin += kScaleWords, ++b) {
    const int64_t n = least(kScaleWords, words - begin);
    decode_fp8(tile + begin * 64, n, decoded);
    for (int64_t g = 0; g < count; ++g) {
      const Group& group = groups[g];
      multiply<M, Fetch::none>(decoded, kTile, group.words + begin * group.stride, group.stride, group.rows, n, kTile,
                               sums + (group.first - base) * kTile, kTile, Into::scaled, scales[b]);
    }
  }
}
