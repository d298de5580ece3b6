// AVX512-BF16 primitives (with VBMI, which every such machine but Cooper Lake has).

ISO_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ISO_INLINE vf dot_bf16(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
ISO_INLINE vh narrow(vf value) { return (vh)_mm512_cvtneps_pbh((__m512)value); }
ISO_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
ISO_INLINE void prefetch_second(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}  // into the second cache

ISO_INLINE void store_lanes(uint32_t* p, vi value, int n) {  // the first n <= W lanes
  _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << n) - 1), (__m512i)value);
}

// 32 pairs (a[i], b[i]) of 16-bit values as words.
ISO_INLINE void interleave_32(const uint16_t* a, const uint16_t* b, uint32_t* out) {
  __m512i low, high;
  low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
                         3, 34, 2, 33, 1, 32, 0);
  high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(first, low, second));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(first, high, second));
}

constexpr int kRowBlock = 12;  // rows × vectors of one register block
constexpr int kVectorBlock = 2;
constexpr int kDotRows = 4, kDotColumns = 4;
constexpr bool kDirectFp8 = true;

// The 128 magnitudes of e4m3 as bfloat16, low and high bytes, for a two-register byte permute. This is exact for
// subnormals and NaN, and it makes subnormals normal, which the dot product would flush otherwise.
struct Fp8Decoder {
  __m512i low0, low1, high0, high1, sign;

  ISO_INLINE Fp8Decoder make() {
    Fp8Decoder d;
    d.low0 = _mm512_loadu_si512(kFp8Table.low), d.low1 = _mm512_loadu_si512(kFp8Table.low + 64);
    d.high0 = _mm512_loadu_si512(kFp8Table.high), d.high1 = _mm512_loadu_si512(kFp8Table.high + 64);
    d.sign = _mm512_set1_epi8(static_cast<char>(0x80));
    return d;
  }

  // 64 codes of one word of a tile → outputs 0 .. 15 and 16 .. 31 as bfloat16 pairs.
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, vi* out) const {
    const __m512i code = _mm512_loadu_si512(codes);
    const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
    const __m512i magnitude = _mm512_permutex2var_epi8(high0, code, high1);
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, code, sign, 0xF8);  // magnitude | (code & sign)
    out[0] = (vi)_mm512_unpacklo_epi8(low, high);
    out[1] = (vi)_mm512_unpackhi_epi8(low, high);
  }
};

ISO_INLINE void decode_fp8(const uint8_t* codes, int64_t words, uint32_t* out) {
  const Fp8Decoder decoder = Fp8Decoder::make();
  for (int64_t u = 0; u < words; ++u) {
    vi pair[2];
    decoder.decode(codes + u * 64, pair);
    prefetch(codes + u * 64 + 4 * kPrefetchWords);
    *reinterpret_cast<vi_memory*>(out + u * kTile) = (vi_memory)pair[0];
    *reinterpret_cast<vi_memory*>(out + u * kTile + 16) = (vi_memory)pair[1];
  }
}

// bfloat16 as sign and mantissa in one byte and a 4-bit code of the exponent (coded.cpp). Lookups take six bits of an
// index, so each table stands there four times, and the bits above a code may be anything.
struct CodedDecoder {
  __m512i low, high, sign;

  ISO_INLINE CodedDecoder make(const uint8_t* tables) {
    CodedDecoder d;
    d.low = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tables)));
    d.high = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tables + 16)));
    d.sign = _mm512_set1_epi8(static_cast<char>(0x80));
    return d;
  }

  // Word `u` (0 or 1) of two → outputs 0 .. 15 and 16 .. 31.
  inline __attribute__((always_inline)) void decode(const uint8_t* pair, int u, vi* out) const {
    const __m512i bytes = _mm512_loadu_si512(pair + u * 64), both = _mm512_loadu_si512(pair + 128);
    const __m512i codes = u == 0 ? both : _mm512_srli_epi16(both, 4);
    const __m512i low_byte =
        _mm512_ternarylogic_epi32(_mm512_permutexvar_epi8(codes, low), bytes, sign, 0xF4);  // low | (bytes & ~sign)
    const __m512i high_byte =
        _mm512_ternarylogic_epi32(_mm512_permutexvar_epi8(codes, high), bytes, sign, 0xF8);  // high | (bytes & sign)
    out[0] = (vi)_mm512_unpacklo_epi8(low_byte, high_byte);
    out[1] = (vi)_mm512_unpackhi_epi8(low_byte, high_byte);
  }
};
