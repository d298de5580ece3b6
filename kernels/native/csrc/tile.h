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

// Two tiles at once for one row, whose products with one wait for each other. False where that is no gain: words that
// are not decoded are multiplied before the next ones are there, and other instruction sets have too few registers, or
// sums enough (AMX).
#if ISO_W != 8
static bool multiply_two(const Linear& weight, const Strip (&strips)[2], const Group* groups, int64_t count) {
  if (ISO_W < 16 || ISO_AMX || count != 1 || groups[0].rows != 1) return false;
  const auto multiply = [&](auto two) ISO_ATTR {
    two(weight, strips, groups[0].words, word_stride(groups[0]));
    return true;
  };
  const bool zeros = weight.grouping.zeros != 0;
  switch (weight.kind) {
    case Kind::fp8:
      return multiply(fp8_two);
    case Kind::int4:
      return zeros ? multiply(grouped_two<Int4Decoder<true>>) : multiply(grouped_two<Int4Decoder<false>>);
    case Kind::int8:
      return multiply(grouped_two<Int8Decoder>);
    case Kind::int6:
      return multiply(grouped_two<Int6Decoder>);
    default:
      return false;
  }
}
#else
ISO_INLINE bool multiply_two(const Linear&, const Strip (&)[2], const Group*, int64_t) { return false; }
#endif
