// Rows × one tile of a packed weight of any kind.

// sums[row][32] = the groups' rows × tile t, rows numbered from groups[0].first. Bias is added by whoever stores the
// sums. `next`: the weights that this thread will most likely read next; they are fetched from memory meanwhile.
template <class M>
static void multiply_tile(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  if (weight.kind == Kind::fp8) return fp8_multiply<M>(weight, t, groups, count, sums, next);
  if (weight.kind == Kind::coded) return coded_multiply<M>(weight, t, groups, count, sums, next);
  const int64_t words = weight.words, base = groups[0].first;
  const auto* w = reinterpret_cast<const uint32_t*>(weight.tile(t));
  if (count == 1) {
    multiply<M, Fetch::stream>(w, kTile, groups[0].words, groups[0].stride, groups[0].rows, words, kTile, sums, kTile,
                               Into::zero, 0.0f, reinterpret_cast<const uint32_t*>(next));
    return;
  }
  for (int64_t begin = 0; begin < words; begin += kBlockWords) {
    const int64_t n = least(kBlockWords, words - begin);
    const auto* following =
        begin + kBlockWords < words ? w + (begin + kBlockWords) * kTile : reinterpret_cast<const uint32_t*>(next);
    for (int64_t g = 0; g < count; ++g) {
      const Group& group = groups[g];
      // The first two passes fetch the next block from memory, half each.
      multiply<M, Fetch::line>(w + begin * kTile, kTile, group.words + begin * group.stride, group.stride, group.rows,
                               n, kTile, sums + (group.first - base) * kTile, kTile,
                               begin == 0 ? Into::zero : Into::add, 0.0f, following + least(g, 1) * n * 16);
    }
  }
}

ISO_INLINE int64_t group_count(int64_t rows) { return ceil_div(rows, kGroup); }

// Cuts `rows` into groups of nearly one size: group g is rows [begin(g), begin(g + 1)).
ISO_INLINE int64_t group_begin(int64_t rows, int64_t g) { return rows * g / group_count(rows); }
