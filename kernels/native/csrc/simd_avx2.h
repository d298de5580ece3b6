// AVX2 and FMA primitives: bfloat16 is widened by shifts.

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
// A tile is decoded in registers for so few groups and rows; beyond that, a block at a time for all of them.
constexpr int kDirectGroups = 1;
#define ISO_DIRECT_ROWS(X) X(1) X(2)

ISO_INLINE __m256i twice(const uint8_t* table) {  // 16 bytes, in both lanes
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
ISO_INLINE __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// e4m3 to bfloat16: the four upper bits give the upper byte of a normal number, the others its lower byte. Subnormals
// (magnitude < 8) come from two byte tables.
struct Fp8Decoder {
  static constexpr int kWords = 1;
  __m256i normal_high, tiny_low, tiny_high;

  ISO_INLINE Fp8Decoder make() {
    alignas(16) uint8_t normal[16];
    for (int i = 0; i < 16; ++i) normal[i] = static_cast<uint8_t>((i & 8) << 4 | (60 + (i & 7)));
    return Fp8Decoder{twice(normal), twice(kFp8Table.low), twice(kFp8Table.high)};
  }

  // One word of a tile → outputs 0 .. 7, 8 .. 15 and so on as bfloat16 pairs.
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, int, vi* out) const {
    const __m256i nibble = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(static_cast<char>(0x80));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i code = load_bytes(codes + half * 32), magnitude = _mm256_andnot_si256(sign, code);
      const __m256i tiny = _mm256_cmpgt_epi8(_mm256_set1_epi8(8), magnitude),
                    nan = _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7f));
      __m256i low = _mm256_andnot_si256(nibble, _mm256_slli_epi16(code, 4));
      __m256i high = _mm256_shuffle_epi8(normal_high, _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble));
      low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(tiny_low, magnitude), tiny);
      high = _mm256_blendv_epi8(
          high, _mm256_or_si256(_mm256_shuffle_epi8(tiny_high, magnitude), _mm256_and_si256(code, sign)), tiny);
      low = _mm256_or_si256(low, nan), high = _mm256_or_si256(high, nan);
      out[half] = (vi)_mm256_unpacklo_epi8(low, high);
      out[2 + half] = (vi)_mm256_unpackhi_epi8(low, high);
    }
  }
};

struct Int8Decoder {
  static constexpr int kWords = 1;
  static constexpr bool kZeros = false;

  ISO_INLINE Int8Decoder make() { return {}; }

  ISO_INLINE __m256i floats(__m256i integers) { return _mm256_castps_si256(_mm256_cvtepi32_ps(integers)); }
  ISO_INLINE vi pair(__m256i bytes) {  // its upper bytes
    const __m256i even = floats(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 8), 24)),
                  odd = floats(_mm256_srai_epi32(bytes, 24));
    return (vi)_mm256_or_si256(odd, _mm256_srli_epi32(even, 16));
  }
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, int, vi* out) const {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i code = load_bytes(codes + half * 32);
      const __m256i value = _mm256_sign_epi8(_mm256_and_si256(code, _mm256_set1_epi8(0x7f)), code);
      out[half] = pair(_mm256_unpacklo_epi16(value, value));
      out[2 + half] = pair(_mm256_unpackhi_epi16(value, value));
    }
  }
};

template <bool kZeroPoints>
struct Int4Decoder {
  static constexpr int kWords = 2;
  static constexpr bool kZeros = kZeroPoints;
  __m256i low, high, zero[4];

  ISO_INLINE Int4Decoder make() {
    Int4Decoder d;
    // A difference is looked up by its magnitude, which is at most 15.
    d.low = twice(kZeros ? kIntegers.magnitude.low : kIntegers.code.low);
    d.high = twice(kZeros ? kIntegers.magnitude.high : kIntegers.code.high);
    return d;
  }
  inline __attribute__((always_inline)) void set_zeros(const uint8_t* zeros) {
    const __m256i low_byte = _mm256_set1_epi16(0xff);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i both = load_bytes(zeros + half * 32), first = _mm256_and_si256(both, low_byte),
                    second = _mm256_andnot_si256(low_byte, both);
      zero[half] = _mm256_or_si256(first, _mm256_slli_epi16(first, 8));
      zero[2 + half] = _mm256_or_si256(second, _mm256_srli_epi16(second, 8));
    }
  }

  // Word `i` (0 or 1) of two. What is looked up is the same for both, and left to the compiler to do once.
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, int i, vi* out) const {
    const __m256i low_byte = _mm256_set1_epi16(0xff);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      __m256i code = load_bytes(codes + v % 2 * 32);
      code = _mm256_and_si256(v < 2 ? code : _mm256_srli_epi16(code, 4), _mm256_set1_epi8(15));
      __m256i sign = _mm256_setzero_si256();
      if constexpr (kZeros) {
        code = _mm256_sub_epi8(code, zero[v]);
        sign = _mm256_and_si256(code, _mm256_set1_epi8(static_cast<char>(0x80)));
        code = _mm256_abs_epi8(code);
      }
      const __m256i lows = _mm256_shuffle_epi8(low, code),
                    highs = _mm256_or_si256(_mm256_shuffle_epi8(high, code), sign);
      out[v] = (vi)(i == 0 ? _mm256_or_si256(_mm256_and_si256(lows, low_byte), _mm256_slli_epi16(highs, 8))
                           : _mm256_or_si256(_mm256_srli_epi16(lows, 8), _mm256_andnot_si256(low_byte, highs)));
    }
  }
};

// bfloat16 as sign and mantissa in one byte and a 4-bit code of the exponent (coded.cpp).
struct CodedDecoder {
  __m256i low, high;

  ISO_INLINE CodedDecoder make(const uint8_t* tables) { return CodedDecoder{twice(tables), twice(tables + kCodes)}; }

  // Word `u` (0 or 1) of two.
  inline __attribute__((always_inline)) void decode(const uint8_t* pair, int u, vi* out) const {
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i bytes = load_bytes(pair + u * 64 + half * 32), both = load_bytes(pair + 128 + half * 32);
      const __m256i code = _mm256_and_si256(u == 0 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
      const __m256i low_byte = _mm256_or_si256(_mm256_shuffle_epi8(low, code), _mm256_andnot_si256(sign, bytes)),
                    high_byte = _mm256_or_si256(_mm256_shuffle_epi8(high, code), _mm256_and_si256(sign, bytes));
      out[half] = (vi)_mm256_unpacklo_epi8(low_byte, high_byte);
      out[2 + half] = (vi)_mm256_unpackhi_epi8(low_byte, high_byte);
    }
  }
};
