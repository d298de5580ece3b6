// AVX512-BF16 primitives (with VBMI, which every such machine but Cooper Lake has).

ISO_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ISO_INLINE vf limited(vf value, float low, float high) {  // `low` where it is NaN
  return (vf)_mm512_min_ps(_mm512_max_ps((__m512)value, _mm512_set1_ps(low)), _mm512_set1_ps(high));
}
ISO_INLINE vf dot_bf16(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
ISO_INLINE vh narrow(vf value) { return (vh)_mm512_cvtneps_pbh((__m512)value); }
// Conversions that GCC makes lane by lane of vectors of bytes.
ISO_INLINE vi load_signed_bytes(const uint8_t* p) {
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ISO_INLINE vb lowest_bytes(vi v) {
  vb out;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(&out), _mm512_cvtepi32_epi8((__m512i)v));
  return out;
}
ISO_INLINE vf load_bf16_vector(const uint16_t* p) {
  return (vf)((vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
}
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
// A tile is decoded in registers for each of so many groups, of any number of rows; beyond that, once for all of them.
#if ISO_AMX
constexpr int kDirectGroups = 1;
#define ISO_DIRECT_ROWS(X) X(1)
#else
constexpr int kDirectGroups = 3;
#define ISO_DIRECT_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#endif

// Bytes of a sign and one of 128 magnitudes, whose bfloat16 values stand in a table of low and one of high bytes, for a
// two-register byte permute. For e4m3 this is exact for subnormals and NaN, and it makes subnormals normal, which the
// dot product would flush otherwise.
struct SignedByteDecoder {
  static constexpr int kWords = 1;  // decoded of each 64 bytes
  __m512i low0, low1, high0, high1, sign;

  ISO_INLINE SignedByteDecoder make(const uint8_t* low, const uint8_t* high) {
    SignedByteDecoder d;
    d.low0 = _mm512_loadu_si512(low), d.low1 = _mm512_loadu_si512(low + 64);
    d.high0 = _mm512_loadu_si512(high), d.high1 = _mm512_loadu_si512(high + 64);
    d.sign = _mm512_set1_epi8(static_cast<char>(0x80));
    return d;
  }

  // One word of a tile → outputs 0 .. 15 and 16 .. 31 as bfloat16 pairs.
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, int, vi* out) const {
    const __m512i code = _mm512_loadu_si512(codes);
    const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
    const __m512i magnitude = _mm512_permutex2var_epi8(high0, code, high1);
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, code, sign, 0xF8);  // magnitude | (code & sign)
    out[0] = (vi)_mm512_unpacklo_epi8(low, high);
    out[1] = (vi)_mm512_unpackhi_epi8(low, high);
  }
};

struct Fp8Decoder : SignedByteDecoder {
  ISO_INLINE Fp8Decoder make() { return Fp8Decoder{SignedByteDecoder::make(kFp8Table.low, kFp8Table.high)}; }
};

struct Int8Decoder : SignedByteDecoder {
  static constexpr int kBytes = 64;
  static constexpr bool kZeros = false;
  ISO_INLINE Int8Decoder make() {
    return Int8Decoder{SignedByteDecoder::make(kIntegers.magnitude.low, kIntegers.magnitude.high)};
  }
};

// A lookup takes the six lowest bits of each byte, so the bits above a code may be anything.
struct Int6Decoder {
  static constexpr int kWords = 4, kBytes = 192;
  static constexpr bool kZeros = false;
  __m512i low, high;

  ISO_INLINE Int6Decoder make() {
    return Int6Decoder{_mm512_loadu_si512(kIntegers.six.low), _mm512_loadu_si512(kIntegers.six.high)};
  }

  // Word `i` (0 .. 3) of four: three lie in the lower bits of 64 bytes each, the fourth in what those leave.
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, int i, vi* out) const {
    const auto part = [&](int p) ISO_ATTR { return _mm512_loadu_si512(codes + 64 * p); };
    __m512i code;
    if (i < 3) {
      code = part(i);
    } else {  // each from where its bits' mask is set, else what comes after
      code = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), _mm512_srli_epi16(part(0), 6),
                                       _mm512_srli_epi16(part(1), 4), 0xCA);
      code = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), code, _mm512_srli_epi16(part(2), 2), 0xCA);
    }
    const __m512i low_byte = _mm512_permutexvar_epi8(code, low), high_byte = _mm512_permutexvar_epi8(code, high);
    out[0] = (vi)_mm512_unpacklo_epi8(low_byte, high_byte);
    out[1] = (vi)_mm512_unpackhi_epi8(low_byte, high_byte);
  }
};

// A lookup takes the five lowest bits of each 16-bit lane. Without zero points each number stands there twice, so the
// bits above a code may be anything; with them the index is the difference of code and zero point.
template <bool kZeroPoints>
struct Int4Decoder {
  static constexpr int kWords = 2, kBytes = 64;
  static constexpr bool kZeros = kZeroPoints;
  __m512i numbers, zero[2];

  ISO_INLINE Int4Decoder make() {
    Int4Decoder d;
    d.numbers = _mm512_loadu_si512(kZeros ? kIntegers.difference : kIntegers.code_twice);
    return d;
  }
  inline __attribute__((always_inline)) void set_zeros(const uint8_t* zeros) {
    const __m512i both = _mm512_loadu_si512(zeros);
    zero[0] = _mm512_and_si512(both, _mm512_set1_epi16(0xff)), zero[1] = _mm512_srli_epi16(both, 8);
  }

  // Word `i` (0 or 1) of two.
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, int i, vi* out) const {
    const __m512i both = _mm512_loadu_si512(codes), word = i == 0 ? both : _mm512_srli_epi16(both, 8);
    const __m512i code[] = {word, _mm512_srli_epi16(word, 4)};
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      __m512i index = code[v];
      if constexpr (kZeros) index = _mm512_sub_epi16(_mm512_and_si512(index, _mm512_set1_epi16(15)), zero[v]);
      out[v] = (vi)_mm512_permutexvar_epi16(index, numbers);
    }
  }
};

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
