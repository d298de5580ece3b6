// Products of bfloat16 rows with a tile on AMX: a step takes 16 words of up to 16 rows against 16 outputs. A step waits
// for the one before it, so two groups of rows go together where there are two.
//
// A step sums its even elements and its odd ones apart, in ascending order, and then adds both to the accumulator
// (TDPBF16PS in Intel's manual): another order than AVX512-BF16's, and so an instruction set of its own. What stands in
// another row changes nothing.

// The tile registers of the calling thread while it lives: 0 to 3 for sums of 16 outputs each, 4 and 5 for rows, 6 and
// 7 for weights. Nothing in between may configure them otherwise. Their products take numbers that are not normal for
// 0, so all other arithmetic does too meanwhile: one row goes without them (RowSums), to the same bits.
class TileRegisters {
 public:
  ISO_INLINE_MEMBER explicit TileRegisters(int rows) {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {0, 0, 0, 0, 0, 0, kStepWords, kStepWords};
    } c;
    for (int i = 0; i < 6; ++i) c.rows[i] = static_cast<uint8_t>(rows);
    asm volatile("ldtilecfg %0" : : "m"(c) : "memory");
    _mm_setcsr(before | 0x8040);  // denormals are zeros, and are flushed to it
  }
  ISO_INLINE_MEMBER ~TileRegisters() {
    _mm_setcsr(before);
    asm volatile("tilerelease" : : : "memory");
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  const unsigned before = _mm_getcsr();
};

// The compiler's own functions for these instructions do not say that they read and write memory.
#define ISO_TILE_LOAD(tile, from, row_bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(row_bytes) : "memory")
#define ISO_TILE_STORE(tile, to, row_bytes) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(row_bytes) : "memory")
#define ISO_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile : : : "memory")
#define ISO_TILE_DOT(sum, rows, weights) \
  asm volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #rows ", %%tmm" #sum : : : "memory")

// What one group of rows brings to a product: its words and its sums, of which those of rows are so far apart.
struct TileRows {
  const uint32_t* words;
  int64_t stride;
  int rows;
  float* sums;
  int64_t sum_stride = kTile;
};

// The words `taken` and on, after the last whole step, in the order of one; `w` is where they begin.
ISO_INLINE void add_rest(const uint32_t* w, const TileRows& group, int64_t taken, int64_t words) {
  for (int r = 0; r < group.rows; ++r) {
    float* to = group.sums + r * group.sum_stride;
    RowSums<1> own;
    own.sums[0][0] = load(to), own.sums[0][1] = load(to + W);
    for (int64_t u = taken; u < words; ++u) {
      const uint32_t* word = w + (u - taken) * kTile;
      const vi weight[kTileVectors] = {load_words(word), load_words(word + W)};
      own.add(weight, group.words + r * group.stride + u);
    }
    own.finish();
    store(to, own.sums[0][0]), store(to + W, own.sums[0][1]);
  }
}

// `words` words of one or two groups of rows, for which TileRegisters were made, against a tile's. Sums start at 0, or
// go on from what they are; what is written of those of rows beyond a group's means nothing. Fetch::line fetches a
// cache line for each word and group.
template <Fetch kFetch, int kGroups>
ISO_INLINE void multiply_steps(const uint32_t* w, const TileRows (&groups)[kGroups], int64_t words, bool go_on,
                               const uint32_t* next) {
  static_assert(kTile == 2 * kStepWords && W == kStepWords && kGroups <= 2);
  constexpr int64_t kTileBytes = kTile * sizeof(float);
  constexpr bool kTwo = kGroups == 2;
  const TileRows &one = groups[0], &two = groups[kGroups - 1];
  if (go_on) {
    ISO_TILE_LOAD(0, one.sums, one.sum_stride * 4);
    ISO_TILE_LOAD(1, one.sums + W, one.sum_stride * 4);
    if (kTwo) ISO_TILE_LOAD(2, two.sums, two.sum_stride * 4);
    if (kTwo) ISO_TILE_LOAD(3, two.sums + W, two.sum_stride * 4);
  } else {
    ISO_TILE_ZERO(0);
    ISO_TILE_ZERO(1);
    if (kTwo) ISO_TILE_ZERO(2);
    if (kTwo) ISO_TILE_ZERO(3);
  }
  const int64_t turn = words * kTile - kPrefetchWords;
  int64_t u = 0;
  for (; u + kStepWords <= words; u += kStepWords, w += kStepWords * kTile) {
    if (kFetch == Fetch::stream) {
      const int64_t beyond = u * kTile - turn;
      const uint32_t* ahead = beyond < 0 ? w + kPrefetchWords : next + beyond;
      for (int i = 0; i < kStepWords * kTile; i += 16) prefetch_block(ahead + i);
    }
    if (kFetch == Fetch::line) {
      for (int i = 0; i < kGroups * kStepWords; ++i) prefetch_block(next + (kGroups * u + i) * 16);
    }
    ISO_TILE_LOAD(4, one.words + u, one.stride * 4);
    ISO_TILE_LOAD(6, w, kTileBytes);
    ISO_TILE_LOAD(7, w + W, kTileBytes);
    ISO_TILE_DOT(0, 4, 6);
    ISO_TILE_DOT(1, 4, 7);
    if (kTwo) {
      ISO_TILE_LOAD(5, two.words + u, two.stride * 4);
      ISO_TILE_DOT(2, 5, 6);
      ISO_TILE_DOT(3, 5, 7);
    }
  }
  ISO_TILE_STORE(0, one.sums, one.sum_stride * 4);
  ISO_TILE_STORE(1, one.sums + W, one.sum_stride * 4);
  if (kTwo) ISO_TILE_STORE(2, two.sums, two.sum_stride * 4);
  if (kTwo) ISO_TILE_STORE(3, two.sums + W, two.sum_stride * 4);
  if (u == words) return;
  add_rest(w, one, u, words);
  if (kTwo) add_rest(w, two, u, words);
}

// Adds to `sums` those of R rows under each of `count` scales, `apart` [scale][row][32], × the scales [scale][32].
template <int R>
ISO_INLINE void add_apart(const float* apart, int count, const float* scales, float* sums, int64_t sum_stride) {
  vf total[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    total[r][0] = load(sums + r * sum_stride), total[r][1] = load(sums + r * sum_stride + W);
  }
  for (int s = 0; s < count; ++s, apart += kGroup * kTile, scales += kTile) {
    const vf first = load(scales), second = load(scales + W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      total[r][0] = fma(load(apart + r * kTile), first, total[r][0]);
      total[r][1] = fma(load(apart + r * kTile + W), second, total[r][1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    store(sums + r * sum_stride, total[r][0]), store(sums + r * sum_stride + W, total[r][1]);
  }
}

// The same for one group, the sums of `scale_words` words apart; each, × its scale, is then added to the group's.
// scales [words / scale_words][32].
ISO_INLINE void multiply_scaled_steps(const uint32_t* w, const TileRows& group, int64_t words, int64_t scale_words,
                                      const float* scales) {
  constexpr int kAtOnce = 4, kRows = 4;
  alignas(64) float apart[kAtOnce * kGroup * kTile];
  for (int64_t first = 0; first < words; first += kAtOnce * scale_words, scales += kAtOnce * kTile) {
    int count = 0;
    for (int64_t u = first; count < kAtOnce && u < words; u += scale_words, ++count) {
      const TileRows own{group.words + u, group.stride, group.rows, apart + count * kGroup * kTile};
      multiply_steps<Fetch::none>(w + u * kTile, {own}, least(scale_words, words - u), false, nullptr);
    }
    int r = 0;
    for (; r + kRows <= group.rows; r += kRows)
      add_apart<kRows>(apart + r * kTile, count, scales, group.sums + r * group.sum_stride, group.sum_stride);
    for (; r < group.rows; ++r)
      add_apart<1>(apart + r * kTile, count, scales, group.sums + r * group.sum_stride, group.sum_stride);
  }
}

#undef ISO_TILE_LOAD
#undef ISO_TILE_STORE
#undef ISO_TILE_ZERO
#undef ISO_TILE_DOT
