// AVX2 and FMA primitives: bfloat16 is widened by shifts, FP8 is decoded to a block of words before use.

ISO_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ISO_INLINE vf dot_bf16(vf sum, vi a, vi b) {
  const vi high = set_word(0xffff0000u);
  return fma((vf)(a & high), (vf)(b & high), fma((vf)(a << 16), (vf)(b << 16), sum));
}
ISO_INLINE vh narrow(vf value) { return narrow_portable(value); }
ISO_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
ISO_INLINE void prefetch_second(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}  // into the second cache

ISO_INLINE void store_lanes(uint32_t* p, vi value, int n) {  // the first n <= W lanes
  _mm256_maskstore_epi32(reinterpret_cast<int*>(p), (__m256i)(lanes() < n), (__m256i)value);
}

// 32 pairs (a[i], b[i]) of 16-bit values as words.
ISO_INLINE void interleave_32(const uint16_t* a, const uint16_t* b, uint32_t* out) {
  for (int i = 0; i < 32; i += 8) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_unpacklo_epi16(first, second));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 4), _mm_unpackhi_epi16(first, second));
  }
}

constexpr int kRowBlock = 4;
constexpr int kVectorBlock = 2;
constexpr int kDotRows = 2, kDotColumns = 4;
constexpr bool kDirectFp8 = false;

ISO_INLINE void decode_fp8(const uint8_t* codes, int64_t words, uint32_t* out) {
  // Subnormals (magnitude < 8) come from two byte tables: high and low halves of m × 2^-9 as bfloat16.
  alignas(32) uint8_t table_low[32], table_high[32];
  for (int i = 0; i < 32; ++i) {
    table_low[i] = i % 16 < 8 ? kFp8Table.low[i % 16] : 0;
    table_high[i] = i % 16 < 8 ? kFp8Table.high[i % 16] : 0;
  }
  const __m256i lows = _mm256_load_si256(reinterpret_cast<const __m256i*>(table_low));
  const __m256i highs = _mm256_load_si256(reinterpret_cast<const __m256i*>(table_high));
  const __m256i bias = _mm256_set1_epi16(120 << 7), eight = _mm256_set1_epi16(8), nan = _mm256_set1_epi16(0x7f);
  const __m256i quiet = _mm256_set1_epi16(0x7fc0), byte_off = _mm256_set1_epi16(static_cast<short>(0x8000));
  for (int64_t u = 0; u < words; ++u) {
    for (int lane = 0; lane < 4; ++lane) {
      const __m256i code =
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + u * 64 + lane * 16)));
      const __m256i magnitude = _mm256_and_si256(code, nan),
                    sign = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8);
      const __m256i normal = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), bias);
      const __m256i index = _mm256_or_si256(magnitude, byte_off);  // the upper byte of each lane looks nothing up
      const __m256i tiny =
          _mm256_or_si256(_mm256_shuffle_epi8(lows, index), _mm256_slli_epi16(_mm256_shuffle_epi8(highs, index), 8));
      __m256i value = _mm256_blendv_epi8(normal, tiny, _mm256_cmpgt_epi16(eight, magnitude));
      value = _mm256_blendv_epi8(value, quiet, _mm256_cmpeq_epi16(magnitude, nan));
      value = _mm256_or_si256(value, sign);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + u * kTile + lane * 4), _mm256_castsi256_si128(value));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + u * kTile + 16 + lane * 4), _mm256_extracti128_si256(value, 1));
    }
  }
}
