// One split of a softmax: kSplit positions counted from position 0, whatever the batch or the chunking of a prompt.
// Splits are merged in ascending order.

struct Softmax {
  float largest, sum;
};

// scores[0 .. n) × scale → weights exp(score - largest), rounded to the activation dtype, up to `count` of them, zero
// from n on. Scores are padded in place to whole vectors.
template <class M>
ISO_INLINE Softmax softmax_split(float* scores, int64_t n, float scale, typename M::T* out, int64_t count) {
  vf largest = set(-__builtin_inff());
  const int64_t padded = ceil_div(n, W) * W;
  for (int64_t i = n; i < padded; ++i) scores[i] = -__builtin_inff();
  for (int64_t i = 0; i < padded; i += W) {
    const vf value = load(scores + i) * set(i + W <= n ? scale : 1.0f);
    if (i + W <= n) {
      store(scores + i, value);
      largest = larger(value, largest);
    }
  }
  if (padded > n) {  // the ragged last vector: scale what is valid
    const int64_t i = padded - W;
    for (int64_t j = i; j < n; ++j) scores[j] = scores[j] * scale;
    largest = larger(load(scores + i), largest);
  }
  const float peak = largest_lane(largest);
  vf sum = set(0.0f);
  for (int64_t i = 0; i < padded; i += W) {
    const vf weight = exp_v(load(scores + i) - set(peak));
    sum = sum + weight;
    M::store(out + i, weight);
  }
  for (int64_t i = padded; i < count; ++i) out[i] = 0;
  return Softmax{peak, sum_lanes(sum)};
}

ISO_INLINE float exp_one(float x) { return exp_v(set(x))[0]; }

// (state, total) becomes the merge of itself and (part, sums). `width` is a multiple of W.
ISO_INLINE void merge_split(Softmax& state, float* total, const Softmax& part, const float* sums, int64_t width) {
  const float peak = part.largest > state.largest ? part.largest : state.largest;
  const float keep = exp_one(state.largest - peak), add = exp_one(part.largest - peak);
  state.sum = state.sum * keep + part.sum * add;
  state.largest = peak;
  for (int64_t i = 0; i < width; i += W) store(total + i, fma(load(sums + i), set(add), load(total + i) * set(keep)));
}

// Two rows of values side by side as words; `second` may be null (zero). Float32 words are the first row itself.
template <class M>
ISO_INLINE void interleave(const typename M::T* first, const typename M::T* second, int64_t n, uint32_t* out) {
  if constexpr (M::f32) {
    for (int64_t i = 0; i < n; i += W) store(reinterpret_cast<float*>(out) + i, load_some<M>(first + i, n - i));
  } else {
    if (n == kTile && second != nullptr) return interleave_32(first, second, out);
    for (int64_t i = 0; i < n; i += W) {
      const vi low = (vi)load_some<M>(first + i, n - i);  // bfloat16 in the upper half
      vi word = (low >> 16) & 0xffff;
      if (second != nullptr) word = word | (vi)load_some<M>(second + i, n - i);
      *reinterpret_cast<vi_memory*>(out + i) = (vi_memory)word;
    }
  }
}
