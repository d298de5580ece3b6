// Rows of a paged cache. Where they are kept in FP8 (kernels/cache_rows.py) they are decoded before they are used:
// codes times a power of two are exact numbers of the activations' type, so nothing after that knows of it.

typedef uint16_t vw __attribute__((vector_size(ISO_W * 4)));  // 2 × W 16-bit values

// Half `H` (0, 1) of two vectors' runs of four words, in turn: what byte_place parts.
template <int H, size_t... I>
ISO_INLINE vi take_turns(vi a, vi b, std::index_sequence<I...>) {
  if constexpr (W == 4) {
    return H == 0 ? a : b;
  } else {
    return __builtin_shufflevector(a, b, ((I / 4 % 2 == 0 ? 0 : W) + H * W / 2 + I / 8 * 4 + I % 4)...);
  }
}

ISO_INLINE void decode_64(const Fp8Decoder& decoder, const uint8_t* codes, vw exponent, uint16_t* out) {
  constexpr int kHalf = kTileVectors / 2;
  vi word[kTileVectors];
  decoder.decode(codes, 0, word);
#pragma GCC unroll 8
  for (int v = 0; v < kTileVectors; ++v) {
    const vi a = word[v / 2], b = word[v / 2 + kHalf];
    const vw value = (vw)(v % 2 == 0 ? take_turns<0>(a, b, Lanes{}) : take_turns<1>(a, b, Lanes{}));
    const vw scaled = value + (exponent & (vw)((value & 0x7fff) != 0));  // zero stays zero
    __builtin_memcpy(out + v * 2 * W, &scaled, sizeof(scaled));
  }
}

ISO_INLINE void decode_latent(const Fp8Decoder& decoder, const uint8_t* codes, int64_t n, const uint16_t* scale,
                              uint16_t* out) {
  const vw exponent = static_cast<uint16_t>(*scale - (127 << 7)) - vw{};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) decode_64(decoder, codes + i, exponent, out + i);
  if (i == n) return;
  uint8_t last[64] = {};
  uint16_t decoded[64];
  __builtin_memcpy(last, codes + i, static_cast<size_t>(n - i));
  decode_64(decoder, last, exponent, decoded);
  __builtin_memcpy(out + i, decoded, static_cast<size_t>(n - i) * sizeof(uint16_t));
}

ISO_INLINE void decode_latent(const Fp8Decoder&, const uint8_t* codes, int64_t n, const float* scale, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(kFp8Table.value[codes[i]]) * *scale;
}

template <class M>
struct CacheRows {
  using T = typename M::T;
  const Cache& cache;
  int64_t bytes = cache.row_bytes(sizeof(T));
  int64_t width = cache.latent + cache.rotary;

  const uint8_t* stored(const int32_t* table, int64_t position) const {
    const int64_t block = table[position / cache.block_size];
    return cache.data + (block * cache.block_size + position % cache.block_size) * bytes;
  }

  // Where the latents, each with its rotary key behind it, of positions [begin, begin + count) are.
  void find(const int32_t* table, int64_t begin, int64_t count, const T** rows) const {
    if (!cache.fp8) {
      for (int64_t p = 0; p < count; ++p) rows[p] = reinterpret_cast<const T*>(stored(table, begin + p));
      return;
    }
    const Fp8Decoder decoder = Fp8Decoder::make();
    auto* decoded = scratch_of<T>(kEntries, count * width);
    for (int64_t p = 0; p < count; ++p) {
      T scale, *row = decoded + p * width;
      const uint8_t *from = stored(table, begin + p), *codes = from + (cache.rotary + 1) * sizeof(T);
      __builtin_memcpy(row + cache.latent, from, cache.rotary * sizeof(T));
      __builtin_memcpy(&scale, from + cache.rotary * sizeof(T), sizeof(T));
      decode_latent(decoder, codes, cache.latent, &scale, row);
      rows[p] = row;
    }
  }
};

// Codes of W values whose magnitudes, over the scale, are at most 448: rounded to nearest even.
ISO_INLINE vb encode(vf value, vf reciprocal) {
  const vi sign = ((vi)value >> 24) & 0x80;
  const vf scaled = (vf)((vi)(value * reciprocal) & 0x7fffffff);
  const vi bits = (vi)scaled, rounded = (bits + 0x7ffff + ((bits >> 20) & 1)) >> 20;
  const vi tiny = (vi)(scaled + set(16384.0f)) & 0xff;  // below 2^-6 in steps of 2^-9: what the sum's last bits count
  const vi code = (bits < (121 << 23)) ? tiny : rounded - (120 << 3);
  return lowest_bytes(code | sign);
}

template <class M>
ISO_INLINE void encode_row(const typename M::T* latent, int64_t n, typename M::T* scale, uint8_t* codes) {
  vi most_bits{};
  for (int64_t i = 0; i < n; i += W) {
    const vi bits = (vi)load_some<M>(latent + i, n - i) & 0x7fffffff;
    most_bits = bits > most_bits ? bits : most_bits;
  }
  int32_t largest = 0;
  for (int i = 0; i < W; ++i) largest = largest > most_bits[i] ? largest : most_bits[i];
  if (largest >= 0x7f800000) {
    *scale = M::one;
    __builtin_memset(codes, 0x7f, static_cast<size_t>(n));
    return;
  }
  const int64_t exponent = most(-100, (largest >> 23) - 127 - 8 + ((largest & 0x7fffff) > 0x600000 ? 1 : 0));
  const vf reciprocal = (vf)set_word(static_cast<uint32_t>(127 - exponent) << 23);
  *scale = M::power_of_two(exponent);
  for (int64_t i = 0; i < n; i += W) {
    const vb some = encode(load_some<M>(latent + i, n - i), reciprocal);
    __builtin_memcpy(codes + i, &some, static_cast<size_t>(least(W, n - i)));
  }
}

template <class M>
static void write_fp8_of(Pool& pool, const typename M::T* latent, int64_t latent_row, const typename M::T* rope,
                         int64_t rope_row, const Cache& cache, const int64_t* slots, int64_t rows) {
  using T = typename M::T;
  const int64_t bytes = cache.row_bytes(sizeof(T)), begin = (cache.rotary + 1) * sizeof(T);
  auto body = [&](int64_t t) ISO_ATTR {
    uint8_t* to = cache.data + slots[t] * bytes;
    T scale;
    __builtin_memset(to + begin + cache.latent, 0, static_cast<size_t>(bytes - begin - cache.latent));
    encode_row<M>(latent + t * latent_row, cache.latent, &scale, to + begin);
    __builtin_memcpy(to, rope + t * rope_row, cache.rotary * sizeof(T));
    __builtin_memcpy(to + cache.rotary * sizeof(T), &scale, sizeof(T));
  };
  parallel(pool_for(pool, single(), rows * cache.latent), rows, body);
}

static void write_fp8(Pool& pool, bool f32, const void* latent, int64_t latent_row, const void* rope, int64_t rope_row,
                      const Cache& cache, const int64_t* slots, int64_t rows) {
  if (f32) {
    write_fp8_of<F32>(pool, static_cast<const float*>(latent), latent_row, static_cast<const float*>(rope), rope_row,
                      cache, slots, rows);
  } else {
    write_fp8_of<Bf16>(pool, static_cast<const uint16_t*>(latent), latent_row, static_cast<const uint16_t*>(rope),
                       rope_row, cache, slots, rows);
  }
}
