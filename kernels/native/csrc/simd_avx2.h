// AVX2 and FMA primitives: bfloat16 is widened by shifts.

ISO_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ISO_INLINE vf limited(vf value, float low, float high) {  // `low` where it is NaN
  return (vf)_mm256_min_ps(_mm256_max_ps((__m256)value, _mm256_set1_ps(low)), _mm256_set1_ps(high));
}
ISO_INLINE vf dot_bf16(vf sum, vi a, vi b) {
  const vi high = set_word(0xffff0000u);
  return fma((vf)(a & high), (vf)(b & high), fma((vf)(a << 16), (vf)(b << 16), sum));
}
ISO_INLINE vh narrow(vf value) { return narrow_portable(value); }
// Conversions that GCC makes lane by lane of vectors of bytes.
ISO_INLINE vi load_signed_bytes(const uint8_t* p) {
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
ISO_INLINE vb lowest_bytes(vi v) {
  const __m256i lowest = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xff));
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(lowest), _mm256_extracti128_si256(lowest, 1));
  vb out;
  _mm_storel_epi64(reinterpret_cast<__m128i*>(&out), _mm_packus_epi16(halves, halves));
  return out;
}
ISO_INLINE vf load_bf16_vector(const uint16_t* p) {
  return (vf)((vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
}
ISO_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
ISO_INLINE void prefetch_second(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}  // into the second cache

ISO_INLINE void store_lanes(uint32_t* p, vi value, int n) {  // the first n <= W lanes
  if (n >= W) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)value);
    return;
  }
  // A masked store takes AMD's processors tens of cycles.
  __m128i rest = _mm256_castsi256_si128((__m256i)value);
  if ((n & 4) != 0) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rest);
    rest = _mm256_extracti128_si256((__m256i)value, 1), p += 4;
  }
  if ((n & 2) != 0) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), rest);
    rest = _mm_unpackhi_epi64(rest, rest), p += 2;
  }
  if ((n & 1) != 0) *p = static_cast<uint32_t>(_mm_cvtsi128_si32(rest));
}

ISO_INLINE vi load_lanes(const uint32_t* p, int64_t n) {  // the others are 0
  return (vi)_mm256_maskload_epi32(reinterpret_cast<const int*>(p), (__m256i)(lanes() < static_cast<int>(least(n, W))));
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

constexpr int kRowBlock = 6;
constexpr int kVectorBlock = 2;
constexpr int kDotRows = 2, kDotColumns = 4;
// A tile is decoded in registers for so few groups and rows; beyond that, a block at a time for all of them.
constexpr int kDirectGroups = 1;
#define ISO_DIRECT_ROWS(X) X(1) X(2)

ISO_INLINE __m256i twice(const uint8_t* table) {  // 16 bytes, in both lanes
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
ISO_INLINE __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// e4m3 to bfloat16: the four upper bits give the upper byte of a normal number, the others its lower byte. Magnitudes
// below 16, among them subnormals, come from two byte tables, which give 0 for all others: a lookup does where the top
// bit of an index is set. The lower table holds what changes the byte of a normal number.
struct Fp8Decoder {
  static constexpr int kWords = 1;
  __m256i normal_high, tiny_low, tiny_high;

  ISO_INLINE Fp8Decoder make() {
    alignas(16) uint8_t normal[16], low[16];
    for (int i = 0; i < 16; ++i) {
      normal[i] = static_cast<uint8_t>((i & 8) << 4 | (i & 7 ? 60 + (i & 7) : 0));
      low[i] = static_cast<uint8_t>(kFp8Table.low[i] ^ i << 4);
    }
    return Fp8Decoder{twice(normal), twice(low), twice(kFp8Table.high)};
  }

  // One word of a tile → outputs 0 .. 7, 8 .. 15 and so on as bfloat16 pairs.
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, int, vi* out) const {
    const __m256i nibble = _mm256_set1_epi8(15), largest = _mm256_set1_epi8(0x7f);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i code = load_bytes(codes + half * 32), magnitude = _mm256_and_si256(code, largest);
      const __m256i tiny = _mm256_add_epi8(magnitude, _mm256_set1_epi8(0x70));
      const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble),
                    lower = _mm256_andnot_si256(nibble, _mm256_slli_epi16(code, 4));
      const __m256i low = _mm256_xor_si256(lower, _mm256_shuffle_epi8(tiny_low, tiny));
      const __m256i high = _mm256_or_si256(
          _mm256_or_si256(_mm256_shuffle_epi8(normal_high, upper), _mm256_shuffle_epi8(tiny_high, tiny)),
          _mm256_cmpeq_epi8(magnitude, largest));  // NaN, whose lower byte is not 0
      out[half] = (vi)_mm256_unpacklo_epi8(low, high);
      out[2 + half] = (vi)_mm256_unpackhi_epi8(low, high);
    }
  }
};

// A word of one half of a tile, 32 bytes → outputs 0 .. 7 and 16 .. 23 of that half's, as pairs of 16-bit integers.
struct Int8Decoder {
  static constexpr int kWords = 1, kBytes = 64;

  ISO_INLINE vi points(const uint8_t*, int) { return set_word(0); }
  ISO_INLINE void decode(const uint8_t* codes, int, vi* out) {
    const __m256i code = load_bytes(codes),
                  value = _mm256_sign_epi8(_mm256_and_si256(code, _mm256_set1_epi8(0x7f)), code);
    out[0] = (vi)_mm256_srai_epi16(_mm256_unpacklo_epi8(value, value), 8);
    out[1] = (vi)_mm256_srai_epi16(_mm256_unpackhi_epi8(value, value), 8);
  }
};

struct Int6Decoder {
  static constexpr int kWords = 4, kBytes = 192;

  ISO_INLINE vi points(const uint8_t*, int) { return set_word(32); }
  ISO_INLINE void decode(const uint8_t* codes, int i, vi* out) {  // word i (0 .. 3) of four
    __m256i code;
    if (i < 3) {
      code = _mm256_and_si256(load_bytes(codes + 64 * i), _mm256_set1_epi8(63));
    } else {
      const auto upper = [&](int part, int down, int bits) ISO_ATTR {
        return _mm256_and_si256(_mm256_srli_epi16(load_bytes(codes + 64 * part), down),
                                _mm256_set1_epi8(static_cast<char>(bits)));
      };
      code = _mm256_or_si256(_mm256_or_si256(upper(0, 6, 3), upper(1, 4, 12)), upper(2, 2, 48));
    }
    out[0] = (vi)_mm256_unpacklo_epi8(code, _mm256_setzero_si256());
    out[1] = (vi)_mm256_unpackhi_epi8(code, _mm256_setzero_si256());
  }
};

template <bool kZeroPoints>
struct Int4Decoder {
  static constexpr int kWords = 2, kBytes = 64;

  ISO_INLINE vi points(const uint8_t* zeros, int v) {  // of outputs 8 v and on
    if (!kZeroPoints) return set_word(8);
    return (vi)_mm256_srli_epi32((__m256i)load_words(zeros + v % 2 * 32), v / 2 * 8) & 0xff;
  }
  ISO_INLINE void decode(const uint8_t* codes, int i, vi* out) {  // word i (0 or 1) of two
    const __m256i both = load_bytes(codes), nibble = _mm256_set1_epi16(15);
    out[0] = (vi)_mm256_and_si256(i == 0 ? both : _mm256_srli_epi16(both, 8), nibble);
    out[1] = (vi)(i == 0 ? _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble) : _mm256_srli_epi16(both, 12));
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
