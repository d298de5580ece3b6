// Functions of vectors, and rows as words in either activation dtype. A lane's result never depends on its neighbours,
// so tails are computed as whole vectors of padded input.

ISO_INLINE vf exp_v(vf x) {
  // x = n ln 2 + r, |r| <= ln 2 / 2; degree 6 (Cephes' coefficients), within 1 ulp or so. Below -87 the result is zero,
  // so a mask of -inf contributes exactly nothing; NaN stays NaN.
  const vf limited = choose(x < set(-87.0f), set(-87.0f), choose(x > set(88.0f), set(88.0f), x));
  const vf shifted = fma(limited, set(1.44269504f), set(12582912.0f));
  const vf n = shifted - set(12582912.0f);
  const vf r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), limited));
  vf p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, r * r, r) + set(1.0f);
  const vf power = (vf)(((vi)shifted - (0x4B400000 - 127)) << 23);
  return choose(x < set(-87.0f), set(0.0f), p * power);
}

ISO_INLINE vf sigmoid_v(vf x) { return set(1.0f) / (set(1.0f) + exp_v(-x)); }
ISO_INLINE vf swiglu_v(vf gate, vf up) { return gate / (set(1.0f) + exp_v(-gate)) * up; }

// Lane sums in one fixed tree.
ISO_INLINE float sum_lanes(vf v) {
  float lane[W];
  store(lane, v);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
  }
  return lane[0];
}

ISO_INLINE float largest_lane(vf v) {
  float lane[W];
  store(lane, v);
  float out = lane[0];
  for (int i = 1; i < W; ++i) out = lane[i] > out ? lane[i] : out;
  return out;
}

template <int S>
ISO_INLINE vf
fold(vf a, vf b) {  // lane i of the result: the pair sum over bit S, of a where that bit is clear, of b where it is set
  return low_of<S>(a, b, Lanes{}) + high_of<S>(a, b, Lanes{});
}

template <int S>
ISO_INLINE vf fold_all(const vf* v) {  // 2 S vectors into one
  if constexpr (S == 1) {
    return fold<1>(v[0], v[1]);
  } else {
    return fold<S>(fold_all<S / 2>(v), fold_all<S / 2>(v + S));
  }
}

// Lane i of the result: the sum over the lanes of v[i].
ISO_INLINE vf sum_each(const vf* v) { return fold_all<W / 2>(v); }

struct Bf16 {
  using T = uint16_t;
  static constexpr int pack = 2;  // elements per word
  static constexpr bool f32 = false;
  ISO_INLINE vf dot(vf sum, vi a, vi b) { return dot_bf16(sum, a, b); }
  ISO_INLINE vf load(const T* p) { return load_bf16_vector(p); }
  ISO_INLINE void store(T* p, vf value) { *reinterpret_cast<vh_memory*>(p) = (vh_memory)narrow(value); }
  ISO_INLINE vf round(vf value) {
    T out[W];
    store(out, value);
    return load(out);
  }
  static constexpr T one = 127 << 7;
  ISO_INLINE T power_of_two(int64_t exponent) { return static_cast<T>((exponent + 127) << 7); }
};

struct F32 {
  using T = float;
  static constexpr int pack = 1;
  static constexpr bool f32 = true;
  ISO_INLINE vf dot(vf sum, vi a, vi b) { return fma((vf)a, (vf)b, sum); }
  ISO_INLINE vf load(const T* p) { return iso::ISO_NAME::load(p); }
  ISO_INLINE void store(T* p, vf value) { iso::ISO_NAME::store(p, value); }
  ISO_INLINE vf round(vf value) { return value; }
  static constexpr T one = 1.0f;
  ISO_INLINE T power_of_two(int64_t exponent) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(exponent + 127) << 23);
  }
};

// The first n of W lanes; the others are zero.
template <class M>
ISO_INLINE vf load_some(const typename M::T* p, int64_t n) {
  if (n >= W) return M::load(p);
  typename M::T padded[W] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return M::load(padded);
}

template <class M>
ISO_INLINE void store_some(typename M::T* p, vf value, int64_t n) {
  if (n >= W) {
    M::store(p, value);
    return;
  }
  typename M::T padded[W];
  M::store(padded, value);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

template <class M>
ISO_INLINE int64_t words_of(int64_t elements) {
  return ceil_div(elements, M::pack);
}

// How many words a packed row has for a word of a weight: AVX2 cannot multiply bfloat16 numbers, so that each of a row
// is kept as a float, which takes no arithmetic any more when it is multiplied by all the outputs of a weight.
template <class M>
constexpr int kRowWords = ISO_W == 8 ? M::pack : 1;

// Word u of a row of `elements`; the half beyond an odd end is zero.
template <class M>
ISO_INLINE uint32_t word_at(const typename M::T* row, int64_t elements, int64_t u) {
  if (M::pack == 2 && 2 * u + 1 >= elements) return *reinterpret_cast<const uint16_t*>(row + 2 * u);
  return load_word(row + u * M::pack);
}

// A word of each of n <= W rows, or both its numbers as floats, one word for each of `rows` rows after the other.
template <int kWords>
ISO_INLINE void store_word(uint32_t* to, int rows, vi value, int n) {
  if constexpr (kWords == 1) {
    store_lanes(to, value, n);
  } else {
    store_lanes(to, value << 16, n);
    store_lanes(to + rows, value & set_word(0xffff0000u), n);
  }
}

// Rows as [word × kWords][row], the order in which the register block broadcasts them. `row(r)` gives row r.
template <class M, int kWords = kRowWords<M>, class Row>
ISO_INLINE void pack_group(int rows, int64_t elements, uint32_t* out, Row row) {
  const int64_t words = words_of<M>(elements), whole = elements / M::pack;
  if (kWords == 2 && rows == 1) {
    for (int64_t k = 0; k < 2 * words; k += W)
      store_lanes(out + k, (vi)load_some<M>(row(0) + k, elements - k), static_cast<int>(least(W, 2 * words - k)));
    return;
  }
  const int64_t blocks = whole / W * W;
  for (int first = 0; first < rows; first += W) {
    const int n = rows - first < W ? rows - first : W;
    const typename M::T* from[W];
    for (int i = 0; i < W; ++i) from[i] = row(first + (i < n ? i : 0));
    for (int64_t u = 0; u < blocks; u += W) {
      vi v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load_words(from[i] + u * M::pack);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store_word<kWords>(out + (u + i) * kWords * rows + first, rows, v[i], n);
    }
    for (int i = 0; i < n; ++i) {
      for (int64_t u = blocks; u < words; ++u)
        store_word<kWords>(out + u * kWords * rows + first + i, rows, set_word(word_at<M>(from[i], elements, u)), 1);
    }
  }
}
