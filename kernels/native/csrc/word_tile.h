// Tiles of plain words, bf16 or float32.

#if ISO_AMX
// One row: its words are on their way from memory, and too few to wait for registers.
ISO_INLINE void word_row(const uint32_t* w, int64_t words, const uint32_t* a, float* sums, const uint32_t* next) {
  RowSums<1> own;
  const int64_t turn = words - kPrefetchWords / kTile;
  const uint32_t* ahead = turn > 0 ? w + kPrefetchWords : next;
  for (int64_t u = 0; u < words; ++u, w += kTile) {
    const vi weight[kTileVectors] = {load_words(w), load_words(w + W)};
    prefetch(ahead), prefetch(ahead + W);
    ahead = u + 1 == turn ? next : ahead + kTile;
    own.add(weight, a + u);
  }
  own.finish();
  store(sums, own.sums[0][0]), store(sums + W, own.sums[0][1]);
}
#endif

template <class M>
static void word_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  const int64_t words = weight.words;
  const auto* w = reinterpret_cast<const uint32_t*>(weight.tile(t));
#if ISO_AMX
  if (kByRow<M> && direct<M>(groups, count)) {
    word_row(w, words, groups[0].words, sums, reinterpret_cast<const uint32_t*>(next));
    return;
  }
#endif
  if (count == 1) {
    multiply_groups<M, Fetch::stream>(w, groups, 1, 0, words, sums, false, reinterpret_cast<const uint32_t*>(next));
    return;
  }
  for (int64_t begin = 0; begin < words; begin += kBlockWords) {
    const int64_t n = least(kBlockWords, words - begin);
    const auto* following =
        begin + kBlockWords < words ? w + (begin + kBlockWords) * kTile : reinterpret_cast<const uint32_t*>(next);
    multiply_groups<M, Fetch::line>(w + begin * kTile, groups, count, begin, n, sums, begin > 0, following);
  }
}
