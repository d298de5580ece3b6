// The matrix product that everything else is built from: up to kGroup rows against one tile of 32 outputs.
//
// One accumulator per (row, output) runs over the words of K in ascending order. Neither the number of rows, nor their places, nor how the
// work is cut into blocks changes that order, so a row's result is the same bits in any company. FP8 sums each 128 inputs apart, then adds
// sum × block scale.

struct Group {
  const uint32_t* words;  // [word][row]
  int64_t stride;         // between words
  int rows;
  int64_t first;  // the group's first row among those of its call
};

enum class Into { zero, add, scaled };  // sums start at 0; go on from `sums`; are added to `sums` × scale

// `words` words of `R` rows against kVectorBlock vectors of outputs. Weight words lie `w_stride` apart, sums of a row `sum_stride`. A stream is
// prefetched: kPrefetchWords ahead, and near its end what will be read next, at `next`.
template <class M, int R, bool kStream>
ISO_INLINE void block(const uint32_t* w, int64_t w_stride, const uint32_t* a, int64_t a_stride, int64_t words, float* sums, int64_t sum_stride,
                      Into into, float scale, const uint32_t* next) {
  constexpr int V = kVectorBlock;
  const int64_t turn = words - kPrefetchWords / kTile;
  const uint32_t* ahead = turn > 0 ? w + kPrefetchWords : next;
  vf c[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[r][v] = into == Into::add ? load(sums + r * sum_stride + v * W) : set(0.0f);
  }
  for (int64_t u = 0; u < words; ++u) {
    vi weight[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) weight[v] = load_words(w + v * W);
    if (kStream) {
      prefetch(ahead);
      if (V * W > 16) prefetch(ahead + 16);
      ahead = u + 1 == turn ? next : ahead + w_stride;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vi x = set_word(load_word(a + r));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = M::dot(c[r][v], weight[v], x);
    }
    w += w_stride;
    a += a_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* sum = sums + r * sum_stride + v * W;
      store(sum, into == Into::scaled ? fma(c[r][v], set(scale), load(sum)) : c[r][v]);
    }
  }
}

// Any number of rows up to kGroup, `outputs` a multiple of 32.
template <class M, bool kStream>
static void multiply(const uint32_t* w, int64_t w_stride, const uint32_t* a, int64_t a_stride, int rows, int64_t words, int64_t outputs,
                     float* sums, int64_t sum_stride, Into into, float scale, const uint32_t* next = nullptr) {
  const int step = static_cast<int>(ceil_div(rows, most(1, ceil_div(rows, kRowBlock))));  // blocks of nearly one size
  for (int r = 0; r < rows; r += step) {
    for (int64_t o = 0; o < outputs; o += kVectorBlock * W) {
      const uint32_t *wo = w + o, *ar = a + r;
      float* so = sums + r * sum_stride + o;
      switch (rows - r < step ? rows - r : step) {
#define ISO_CASE(R) case R: block<M, R, kStream>(wo, w_stride, ar, a_stride, words, so, sum_stride, into, scale, kStream ? next + o : nullptr); break;
        ISO_CASE(1) ISO_CASE(2) ISO_CASE(3) ISO_CASE(4)
#if ISO_W == 16
        ISO_CASE(5) ISO_CASE(6) ISO_CASE(7) ISO_CASE(8) ISO_CASE(9) ISO_CASE(10) ISO_CASE(11) ISO_CASE(12)
#endif
#undef ISO_CASE
        default: break;
      }
    }
  }
}

#if ISO_W == 16
// FP8 decoded in registers, for a tile that is used by few groups: weights cross the caches as bytes.
template <int R>
ISO_INLINE void fp8_tile(const uint8_t* codes, const float* scales, int64_t words, const uint32_t* a, int64_t a_stride, float* sums,
                         const uint8_t* next) {
  const Fp8Decoder decoder = Fp8Decoder::make();
  for (int r = 0; r < R * 2; ++r) store(sums + r * W, set(0.0f));
  for (int64_t begin = 0; begin < words; begin += kScaleWords) {
    const int64_t end = least(begin + kScaleWords, words);
    vf c[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = set(0.0f);
    const int64_t beyond = begin * 64 + kPrefetchWords * 4 - words * 64;  // how far past the tile's end the stream is prefetched
    const uint8_t* ahead = beyond < 0 ? codes + kPrefetchWords * 4 : next + beyond;
    for (int64_t u = begin; u < end; ++u) {
      vi weight[2];
      decoder.decode(codes, weight);
      prefetch(ahead);
      codes += 64;
      ahead += 64;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vi x = set_word(load_word(a + r));
        c[r][0] = dot_bf16(c[r][0], weight[0], x);
        c[r][1] = dot_bf16(c[r][1], weight[1], x);
      }
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

static void fp8_group(const uint8_t* codes, const float* scales, int64_t words, const Group& g, float* sums, const uint8_t* next) {
  switch (g.rows) {
#define ISO_CASE(R) case R: fp8_tile<R>(codes, scales, words, g.words, g.stride, sums, next); break;
    ISO_CASE(1) ISO_CASE(2) ISO_CASE(3) ISO_CASE(4) ISO_CASE(5) ISO_CASE(6) ISO_CASE(7) ISO_CASE(8) ISO_CASE(9) ISO_CASE(10) ISO_CASE(11) ISO_CASE(12)
#undef ISO_CASE
    default: break;
  }
}
#else
static void fp8_group(const uint8_t*, const float*, int64_t, const Group&, float*, const uint8_t*) {}
#endif

// sums[row][32] = the groups' rows × tile t, rows numbered from groups[0].first. Bias is added by whoever stores the sums. `next`: the weights that
// this thread will most likely read next; they are fetched from memory meanwhile.
template <class M>
static void multiply_tile(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums, const uint8_t* next) {
  constexpr int64_t kBlockWords = 128;  // 16 KiB of a tile stay in the first cache while all groups pass over them
  const int64_t words = weight.words, base = groups[0].first;
  const uint8_t* tile = weight.tile(t);
  if (weight.kind == Kind::fp8) {
    const float* scales = weight.scales + t * weight.scale_blocks;
    if (kDirectFp8 && count <= 3) {  // beyond that, decoding once for all groups pays
      for (int64_t g = 0; g < count; ++g) fp8_group(tile, scales, words, groups[g], sums + (groups[g].first - base) * kTile, next);
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
        multiply<M, false>(decoded, kTile, group.words + begin * group.stride, group.stride, group.rows, n, kTile,
                           sums + (group.first - base) * kTile, kTile, Into::scaled, scales[b]);
      }
    }
    return;
  }
  const auto* w = reinterpret_cast<const uint32_t*>(tile);
  if (count == 1) {
    multiply<M, true>(w, kTile, groups[0].words, groups[0].stride, groups[0].rows, words, kTile, sums, kTile, Into::zero, 0.0f,
                      reinterpret_cast<const uint32_t*>(next));
    return;
  }
  for (int64_t begin = 0; begin < words; begin += kBlockWords) {
    const int64_t n = least(kBlockWords, words - begin);
    for (int64_t g = 0; g < count; ++g) {
      const Group& group = groups[g];
      multiply<M, false>(w + begin * kTile, kTile, group.words + begin * group.stride, group.stride, group.rows, n, kTile,
                         sums + (group.first - base) * kTile, kTile, begin == 0 ? Into::zero : Into::add, 0.0f);
    }
  }
}

ISO_INLINE int64_t group_count(int64_t rows) { return ceil_div(rows, kGroup); }

// Cuts `rows` into groups of nearly one size: group g is rows [begin(g), begin(g + 1)).
ISO_INLINE int64_t group_begin(int64_t rows, int64_t g) { return rows * g / group_count(rows); }
