// Rows × one tile of a packed weight of any kind.

template <class M>
constexpr decltype(&word_multiply<M>) kMultiply[kKinds] = {
    word_multiply<M>,   // bf16
    fp8_multiply<M>,    // fp8
    word_multiply<M>,   // f32
    coded_multiply<M>,  // coded
};

// sums[row][32] = the groups' rows × tile t, rows numbered from groups[0].first. Bias is added by whoever stores the
// sums. `next`: the weights that this thread will most likely read next; they are fetched from memory meanwhile.
template <class M>
static void multiply_tile(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  kMultiply<M>[static_cast<int>(weight.kind)](weight, t, groups, count, sums, next);
}

ISO_INLINE int64_t group_count(int64_t rows) { return ceil_div(rows, kGroup); }

// Cuts `rows` into groups of nearly one size: group g is rows [begin(g), begin(g + 1)).
ISO_INLINE int64_t group_begin(int64_t rows, int64_t g) { return rows * g / group_count(rows); }
