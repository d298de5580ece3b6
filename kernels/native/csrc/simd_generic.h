// Plain C++ primitives, four lanes: SSE2, NEON or scalars, as the compiler sees fit.

ISO_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
ISO_INLINE vf limited(vf value, float low, float high) {  // `low` where it is NaN
  const vf enough = larger(value, set(low));
  return enough < set(high) ? enough : set(high);
}
ISO_INLINE vf dot_bf16(vf sum, vi a, vi b) {
  const vi high = set_word(0xffff0000u);
  return sum + (vf)(a << 16) * (vf)(b << 16) + (vf)(a & high) * (vf)(b & high);
}
ISO_INLINE vh narrow(vf value) { return narrow_portable(value); }
ISO_INLINE vi load_signed_bytes(const uint8_t* p) {
  vi out{};
  for (int i = 0; i < W; ++i) out[i] = static_cast<int8_t>(p[i]);
  return out;
}
ISO_INLINE vb lowest_bytes(vi v) { return __builtin_convertvector(v, vb); }
ISO_INLINE vf load_bf16_vector(const uint16_t* p) {
  const vh halves = (vh) * reinterpret_cast<const vh_memory*>(p);
  return (vf)(__builtin_convertvector(halves, vi) << 16);
}
ISO_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
ISO_INLINE void prefetch_second(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second cache

ISO_INLINE void store_lanes(uint32_t* p, vi value, int n) {  // the first n <= W lanes
  for (int i = 0; i < n; ++i) p[i] = static_cast<uint32_t>(value[i]);
}

// 32 pairs (a[i], b[i]) of 16-bit values as words.
ISO_INLINE void interleave_32(const uint16_t* a, const uint16_t* b, uint32_t* out) {
  for (int i = 0; i < 32; ++i) out[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
}

constexpr int kRowBlock = 4;
constexpr int kVectorBlock = 2;
constexpr int kDotRows = 2, kDotColumns = 4;
// Every tile is decoded a block at a time.
constexpr int kDirectGroups = 0;
#define ISO_DIRECT_ROWS(X)

// A word of a tile: `value(place)` gives the bfloat16 of each of its 64 bytes.
template <class Value>
ISO_INLINE void decode_places(vi* out, Value value) {
  uint32_t words[kTile];
  for (int o = 0; o < kTile; ++o) {
    const int place = 2 * byte_place(o);
    words[o] = value(place) | static_cast<uint32_t>(value(place + 1)) << 16;
  }
  __builtin_memcpy(out, words, sizeof(words));
}

struct Fp8Decoder {
  static constexpr int kWords = 1;
  ISO_INLINE Fp8Decoder make() { return {}; }
  void decode(const uint8_t* codes, int, vi* out) const {
    decode_places(out, [&](int place) { return kFp8Table.value[codes[place]]; });
  }
};

struct Int8Decoder {
  static constexpr int kWords = 1, kBytes = 64;
  static constexpr bool kZeros = false;
  ISO_INLINE Int8Decoder make() { return {}; }
  void decode(const uint8_t* codes, int, vi* out) const {
    decode_places(out, [&](int place) {
      const int magnitude = codes[place] & 0x7f;
      return kIntegers.magnitude.low[magnitude] | (kIntegers.magnitude.high[magnitude] | (codes[place] & 0x80)) << 8;
    });
  }
};

struct Int6Decoder {
  static constexpr int kWords = 4, kBytes = 192;
  static constexpr bool kZeros = false;
  ISO_INLINE Int6Decoder make() { return {}; }
  void decode(const uint8_t* codes, int i, vi* out) const {
    decode_places(out, [&](int place) {
      const uint8_t *a = codes + place, *b = a + 64, *c = b + 64;
      const int code = i < 3 ? a[64 * i] & 63 : *a >> 6 | *b >> 6 << 2 | *c >> 6 << 4;
      return kIntegers.six.low[code] | kIntegers.six.high[code] << 8;
    });
  }
};

template <bool kZeroPoints>
struct Int4Decoder {
  static constexpr int kWords = 2, kBytes = 64;
  static constexpr bool kZeros = kZeroPoints;
  const uint8_t* zero = nullptr;
  ISO_INLINE Int4Decoder make() { return {}; }
  void set_zeros(const uint8_t* zeros) { zero = zeros; }
  void decode(const uint8_t* codes, int i, vi* out) const {
    uint32_t words[kTile];
    for (int o = 0; o < kTile; ++o) {
      words[o] = value(codes, i, o, 0) | static_cast<uint32_t>(value(codes, i, o, 1)) << 16;
    }
    __builtin_memcpy(out, words, sizeof(words));
  }
  uint16_t value(const uint8_t* codes, int i, int o, int element) const {
    const int lane = int4_place(o) + 2 * element, upper = o / 16;
    const int code = codes[lane + i] >> 4 * upper & 15;
    return kIntegers.difference[(code - (kZeros ? zero[lane + upper] : 8)) & 31];
  }
};
