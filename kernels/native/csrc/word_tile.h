// Tiles of plain words, bf16 or float32.

template <class M>
static void word_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  const int64_t words = weight.words, base = groups[0].first;
  const auto* w = reinterpret_cast<const uint32_t*>(weight.tile(t));
  if (count == 1) {
    multiply_group<M, Fetch::stream>(w, groups[0], 0, words, sums, Into::zero, nullptr,
                                     reinterpret_cast<const uint32_t*>(next));
    return;
  }
  for (int64_t begin = 0; begin < words; begin += kBlockWords) {
    const int64_t n = least(kBlockWords, words - begin);
    const auto* following =
        begin + kBlockWords < words ? w + (begin + kBlockWords) * kTile : reinterpret_cast<const uint32_t*>(next);
    for (int64_t g = 0; g < count; ++g) {
      const Group& group = groups[g];
      // The first two passes fetch the next block from memory, half each.
      multiply_group<M, Fetch::line>(w + begin * kTile, group, begin, n, sums + (group.first - base) * kTile,
                                     begin == 0 ? Into::zero : Into::add, nullptr, following + least(g, 1) * n * 16);
    }
  }
}
