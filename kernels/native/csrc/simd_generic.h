// Plain C++ primitives, four lanes: SSE2, NEON or scalars, as the compiler sees fit.

ISO_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
ISO_INLINE vf dot_bf16(vf sum, vi a, vi b) {
  const vi high = set_word(0xffff0000u);
  return sum + (vf)(a << 16) * (vf)(b << 16) + (vf)(a & high) * (vf)(b & high);
}
ISO_INLINE vh narrow(vf value) { return narrow_portable(value); }
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
constexpr bool kDirectFp8 = false;

ISO_INLINE void decode_fp8(const uint8_t* codes, int64_t words, uint32_t* out) {
  for (int64_t u = 0; u < words; ++u) {
    for (int o = 0; o < kTile; ++o) {
      const uint8_t even = codes[u * 64 + fp8_place(o) * 2], odd = codes[u * 64 + fp8_place(o) * 2 + 1];
      out[u * kTile + o] = kFp8Table.value[even] | static_cast<uint32_t>(kFp8Table.value[odd]) << 16;
    }
  }
}
