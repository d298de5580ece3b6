// Tiles of plain words, bf16 or float32.

template <class M>
static void word_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  const int64_t words = weight.words;
  const auto* w = reinterpret_cast<const uint32_t*>(weight.tile(t));
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
