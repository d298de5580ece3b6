// Rows × one tile of a packed weight of any kind.

// sums[row][32] = the groups' rows × tile t, rows numbered from groups[0].first. Bias is added by whoever stores the
// sums. `next`: the weights that this thread will most likely read next; they are fetched from memory meanwhile.
template <class M>
static void multiply_tile(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
#define ISO_KIND(name, multiplication) multiplication##_multiply<M>,
  static constexpr decltype(&word_multiply<M>) by_kind[] = {ISO_TILE_KINDS(ISO_KIND)};
#undef ISO_KIND
  by_kind[static_cast<int>(weight.kind)](weight, t, groups, count, sums, next);
}
