// Integers with a scale for each group of inputs (grouped.cpp): the sums of a group apart, then added with its scales.
// A code less its zero point is exact in bfloat16.

// The scales of a block, where its codes end.
ISO_INLINE void block_scales(const Linear& weight, const uint8_t* block, vf* scale) {
  const uint8_t* scales = block + weight.code_bytes;
#pragma GCC unroll 8
  for (int v = 0; v < kTileVectors; ++v) scale[v] = load_scales(weight.grouping, scales, v);
}

template <class D>
ISO_INLINE void take_zeros(D& decoder, const Linear& weight, const uint8_t* block) {
  if constexpr (D::kZeros) decoder.set_zeros(block + weight.code_bytes + kTile * weight.grouping.scale_bytes);
}

// R rows against B blocks at once of a tile that is decoded in registers: the sums of one wait for each other, those of
// two do not. The first block begins with word `a` of the rows.
template <class D, int R, int B>
ISO_INLINE void grouped_some(const Linear& weight, const uint8_t* block, const uint32_t* a, int64_t a_stride,
                             int64_t words, float* sums, const uint8_t* ahead) {
  const int64_t block_bytes = weight.block_bytes;
  D decoder[B];
  RowSums<R> own[B];
#pragma GCC unroll 2
  for (int b = 0; b < B; ++b) {
    decoder[b] = D::make();
    take_zeros(decoder[b], weight, block + b * block_bytes);
  }
  const uint8_t* const end = ahead + B * block_bytes;
  const uint8_t* codes = block;
  for (int64_t u = 0; u < words; u += D::kWords, codes += D::kBytes) {
#pragma GCC unroll 6
    for (int i = 0; i < B * D::kBytes; i += 64, ahead += 64) prefetch(ahead);
#pragma GCC unroll 4
    for (int i = 0; i < D::kWords; ++i) {
      if (i > 0 && u + i == words) break;
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) {
        vi word[kTileVectors];
        decoder[b].decode(codes + b * block_bytes, i, word);
        own[b].add(word, a + b * words * a_stride);
      }
      a += a_stride;
    }
  }
  for (; ahead < end; ahead += 64) prefetch(ahead);
#pragma GCC unroll 2
  for (int b = 0; b < B; ++b) {
    vf scale[kTileVectors];
    block_scales(weight, block + b * block_bytes, scale);
    own[b].add_scaled(sums, scale);
  }
}

// Decoded in registers, for a tile that is used by few groups of rows.
template <class D, int R>
ISO_INLINE void grouped_tile(const Linear& weight, const uint8_t* block, const uint32_t* a, int64_t a_stride,
                             float* sums, const uint8_t* next) {
  constexpr int kBlocks = !ISO_AMX && R <= 2 ? 2 : 1;  // more rows have enough sums that wait for nothing
  const int64_t group_words = weight.grouping.inputs / 2;
  const uint8_t* const end_of_tile = block + weight.tile_bytes;
  for (int i = 0; i < R * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0; begin < weight.words;) {
    const uint8_t* ahead = block + kPrefetchWords * 4;
    if (ahead >= end_of_tile) ahead = next + (ahead - end_of_tile);
    const int64_t left = weight.words - begin;
    const bool several = kBlocks > 1 && left >= kBlocks * group_words;
    if (several) {
      grouped_some<D, R, kBlocks>(weight, block, a, a_stride, group_words, sums, ahead);
    } else {
      grouped_some<D, R, 1>(weight, block, a, a_stride, least(group_words, left), sums, ahead);
    }
    const int64_t blocks = several ? kBlocks : 1;
    begin += blocks * group_words, a += blocks * group_words * a_stride, block += blocks * weight.block_bytes;
  }
}

// The same for one row and two tiles at once.
template <class D>
static void grouped_two(const Linear& weight, const Strip (&strips)[2], const uint32_t* a, int64_t a_stride) {
  const int64_t group_words = weight.grouping.inputs / 2;
  D decoder[] = {D::make(), D::make()};
  const uint8_t* block[] = {weight.tile(strips[0].tile), weight.tile(strips[1].tile)};
  for (int i = 0; i < kTile; i += W) store(strips[0].sums + i, set(0.0f)), store(strips[1].sums + i, set(0.0f));
  for (int64_t begin = 0; begin < weight.words; begin += group_words) {
    const int64_t n = least(group_words, weight.words - begin);
    const uint8_t *codes[2], *ahead[2];
    RowSums<1> own[2];
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      codes[t] = block[t];
      const int64_t beyond = block[t] + kPrefetchWords * 4 - weight.tile(strips[t].tile + 1);
      ahead[t] = beyond < 0 ? block[t] + kPrefetchWords * 4 : strips[t].next + beyond;
      take_zeros(decoder[t], weight, block[t]);
    }
    for (int64_t u = 0; u < n; u += D::kWords) {
#pragma GCC unroll 4
      for (int i = 0; i < D::kWords; ++i) {
        if (i > 0 && u + i == n) break;
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) {
          vi word[kTileVectors];
          decoder[t].decode(codes[t], i, word);
          own[t].add(word, a);
        }
        a += a_stride;
      }
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) {
#pragma GCC unroll 3
        for (int i = 0; i < D::kBytes; i += 64, ahead[t] += 64) prefetch(ahead[t]);
        codes[t] += D::kBytes;
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const uint8_t* const end = block[t] + weight.block_bytes;
      for (const uint8_t* p = codes[t]; p < end; p += 64, ahead[t] += 64) prefetch(ahead[t]);
      vf scale[kTileVectors];
      block_scales(weight, block[t], scale);
      own[t].add_scaled(strips[t].sums, scale);
      block[t] = end;
    }
  }
}

template <class D>
static void grouped_group(const Linear& weight, const uint8_t* tile, const Group& g, float* sums, const uint8_t* next) {
  switch (g.rows) {
#define ISO_CASE(R)                                                        \
  case R:                                                                  \
    grouped_tile<D, R>(weight, tile, g.words, word_stride(g), sums, next); \
    break;
    ISO_DIRECT_ROWS(ISO_CASE)
#undef ISO_CASE
    default:
      break;
  }
}

// Decoded once for all rows, kBlockWords at a time.
template <class M, class D>
static void grouped_blocks(const Linear& weight, const uint8_t* tile, const Group* groups, int64_t count, float* sums,
                           const uint8_t* next) {
  D decoder = D::make();
  const int64_t group_words = weight.grouping.inputs / 2, base = groups[0].first;
  const uint8_t* end_of_tile = tile + weight.tile_bytes;
  alignas(64) uint32_t decoded[kBlockWords * kTile];
  alignas(64) float scales[kBlockWords / kLeastGroupWords * kTile];
  const int64_t rows = groups[count - 1].first + groups[count - 1].rows - base;
  for (int64_t i = 0; i < rows * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0; begin < weight.words; begin += kBlockWords) {
    const int64_t end = least(begin + kBlockWords, weight.words);
    int64_t at = 0;
    float* scale_to = scales;
    for (int64_t first = begin; first < end; first += group_words, tile += weight.block_bytes, scale_to += kTile) {
      take_zeros(decoder, weight, tile);
      const int64_t n = least(group_words, end - first);
      const uint8_t* codes = tile;
      for (int64_t u = 0; u < n; u += D::kWords, codes += D::kBytes) {
#pragma GCC unroll 3
        for (int i = 0; i < D::kBytes; i += 64) {
          const uint8_t* ahead = codes + i + kPrefetchWords * 4;
          prefetch_block(ahead < end_of_tile ? ahead : next + (ahead - end_of_tile));
        }
#pragma GCC unroll 4
        for (int i = 0; i < D::kWords; ++i, ++at) {
          if (i > 0 && u + i == n) break;
          vi word[kTileVectors];
          decoder.decode(codes, i, word);
          keep_word(decoded, at, word);
        }
      }
      vf scale[kTileVectors];
      block_scales(weight, tile, scale);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) store(scale_to + v * W, scale[v]);
    }
    multiply_scaled<M>(decoded, groups, count, begin, end - begin, group_words, sums, scales);
  }
}

template <class M, class D>
static void grouped_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                             const uint8_t* next) {
  if (!direct<M>(groups, count)) {
    grouped_blocks<M, D>(weight, weight.tile(t), groups, count, sums, next);
    return;
  }
  for (int64_t g = 0; g < count; ++g)
    grouped_group<D>(weight, weight.tile(t), groups[g], sums + (groups[g].first - groups[0].first) * kTile, next);
}

template <class M>
static void int4_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  if (weight.grouping.zeros != 0) {
    grouped_multiply<M, Int4Decoder<true>>(weight, t, groups, count, sums, next);
  } else {
    grouped_multiply<M, Int4Decoder<false>>(weight, t, groups, count, sums, next);
  }
}

template <class M>
static void int8_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  grouped_multiply<M, Int8Decoder>(weight, t, groups, count, sums, next);
}

template <class M>
static void int6_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  grouped_multiply<M, Int6Decoder>(weight, t, groups, count, sums, next);
}

// Groups as products with weights take them: those that there are.
template <class M>
class TakenGroups {
 public:
  TakenGroups(const Group* groups, int64_t, int64_t, int64_t, bool) : groups_(groups) {}
  const Group* groups() const { return groups_; }
  bool made() const { return false; }
  void make(const Linear&, int64_t) const {}

 private:
  const Group* groups_;
};
ISO_INLINE bool takes_integers(const Linear&) { return false; }
