// Dot products of rows with rows, both stored along K: no packing, which suits the keys of a cache and the gate of a
// router.

// out[r][c] = Σ_k rows[r][k] × columns[c][k] for kDotRows × kDotColumns rows given by pointers to `words` words, a
// multiple of W. Lanes run over K and are summed in one fixed tree.
template <class M>
ISO_INLINE void dot_block(const uint32_t* const* rows, const uint32_t* const* columns, int64_t words, float* out) {
  vf c[kDotRows * kDotColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kDotRows * kDotColumns; ++i) c[i] = set(0.0f);
  for (int64_t u = 0; u < words; u += W) {
    vi column[kDotColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) column[j] = load_words(columns[j] + u);
#pragma GCC unroll 4
    for (int i = 0; i < kDotRows; ++i) {
      const vi row = load_words(rows[i] + u);
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) c[i * kDotColumns + j] = M::dot(c[i * kDotColumns + j], row, column[j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kDotRows * kDotColumns; i += W) store(out + i, sum_each(c + i));
}
