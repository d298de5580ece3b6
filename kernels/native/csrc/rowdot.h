// Dot products of rows with rows, both stored along K: no packing, which suits the keys of a cache and the gate of a
// router.

// out[r][c] = Σ_k rows[r][k] × column c's word k for R × kDotColumns rows of `words` words, a multiple of W; `column(c,
// k)` gives W words. Lanes run over K and are summed in one fixed tree, whatever R is.
template <class M, int R, class Column>
ISO_INLINE void dot_columns(const uint32_t* const* rows, Column column, int64_t words, float* out) {
  vf c[kDotRows * kDotColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kDotRows * kDotColumns; ++i) c[i] = set(0.0f);  // a whole number of W
  for (int64_t u = 0; u < words; u += W) {
    vi word[kDotColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) word[j] = column(j, u);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const vi row = load_words(rows[i] + u);
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) c[i * kDotColumns + j] = M::dot(c[i * kDotColumns + j], row, word[j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < R * kDotColumns; i += W) store(out + i, sum_each(c + i));
}

template <class M>
ISO_INLINE void dot_block(const uint32_t* const* rows, const uint32_t* const* columns, int64_t words, float* out) {
  dot_columns<M, kDotRows>(rows, [&](int j, int64_t u) ISO_ATTR { return load_words(columns[j] + u); }, words, out);
}
