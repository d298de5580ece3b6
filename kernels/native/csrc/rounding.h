// Rounding of weights to integers of four, six and eight bits, one scale for each kRoundGroup inputs of an output: what
// kernels/formats/rounding.py states, to the bit. Each lane has a group of its own, so every operation is the one that
// torch does elementwise, sums by halves among them. Included with contraction off: nothing here may use `fma`.

constexpr int kLongBits = 7;  // after the point of a scale: as bfloat16 has them
// What is added to it is rounded to an integer, half to even, which its lowest bits then hold: 1.5 × 2^23.
constexpr float kIntegerPoint = 12582912.0f;
// To what the number that lies farthest from 0 is mapped by the scales that are tried.
constexpr float kReaches[] = {-8.0f, -7.2f, -7.6f, -8.4f, -8.8f};
constexpr int64_t kRoundChunk = 2048;  // groups of one item

ISO_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }

// Rounded to so many bits after the point, half to even, and 1 where it would be 0.
template <int kKept>
ISO_INLINE vf as_scale(vf scale) {
  constexpr int kLeft = 23 - kKept, kHalf = 1 << (kLeft - 1);
  const vi bits = (vi)scale, nan = (bits & 0x7fffffff) > 0x7f800000;
  const vf rounded = (vf)((nan ? bits : bits + (kHalf - 1) + ((bits >> kLeft) & 1)) & -(1 << kLeft));
  return choose(rounded == set(0), set(1), choose(nan, scale, rounded));
}

// f(0) … f(31), the first half added to the second, and so on, until one is left.
template <int kStep = 1, class F>
ISO_INLINE vf sum_by_halves(const F& f, int i = 0) {
  if constexpr (2 * kStep == kRoundGroup) {
    return f(i) + f(i + kStep);
  } else {
    return sum_by_halves<2 * kStep>(f, i) + sum_by_halves<2 * kStep>(f, i + kStep);
  }
}

ISO_INLINE vf int4_code(vf x, vf scale) { return limited(x / scale, -8, 7) + set(kIntegerPoint) - set(kIntegerPoint); }

struct Int4Loss {
  const vf* x;
  vf scale;
  ISO_INLINE_MEMBER vf operator()(int i) const {
    const vf missed = int4_code(x[i], scale) * scale - x[i];
    return missed * missed;
  }
};

struct Product {
  const vf *a, *b;
  ISO_INLINE_MEMBER vf operator()(int i) const { return a[i] * b[i]; }
};

// The scale that fits the codes of `scale` best, by least squares.
ISO_INLINE vf fitted(const vf* x, vf scale) {
  vf codes[kRoundGroup];
  for (int i = 0; i < kRoundGroup; ++i) codes[i] = int4_code(x[i], scale);
  return sum_by_halves(Product{x, codes}) / larger(sum_by_halves(Product{codes, codes}), set(1));
}

struct RoundInt4 {
  static constexpr int kBits = 4;
  static constexpr int kScaleBits = 4;  // of scales, after the point; of one by which nothing is lost, kLongBits

  // Of finite numbers.
  ISO_INLINE vf scale(const vf* x) {
    vf highest = x[0], lowest = x[0];
    for (int i = 1; i < kRoundGroup; ++i) highest = larger(x[i], highest), lowest = smaller(x[i], lowest);
    const vf farthest = choose(highest > -lowest, highest, lowest);
    vf fit = farthest, best = as_scale<kScaleBits>(farthest / set(kReaches[0])),
       lost = sum_by_halves(Int4Loss{x, best});
#pragma GCC unroll 1
    for (int r = 1; r <= 5; ++r) {
      if (r == 5) fit = fitted(x, best);
      const vf tried = as_scale<kScaleBits>(r < 5 ? farthest / set(kReaches[r]) : fit);
      const vf loss = sum_by_halves(Int4Loss{x, tried});
      const vi wins = loss < lost;
      best = choose(wins, tried, best), lost = choose(wins, loss, lost);
    }
    const vf longer = as_scale<kLongBits>(fit);
    const vi whole = (sum_by_halves(Int4Loss{x, longer}) == set(0)) & (lost > set(0));
    return choose(whole, longer, best);
  }
  // In the lowest bits; 8 stands for 0.
  ISO_INLINE vi code(vf x, vf scale) { return (vi)(limited(x / scale, -8, 7) + set(kIntegerPoint + 8)); }
};

// A byte each, -kLargest .. kLargest.
template <int kLargest>
struct RoundBytes {
  static constexpr int kBits = 8;

  ISO_INLINE vf scale(const vf* x) {
    vi largest = (vi)x[0] & 0x7fffffff;  // whose order is that of the magnitudes, with NaN above all
    for (int i = 1; i < kRoundGroup; ++i) {
      const vi magnitude = (vi)x[i] & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    return as_scale<kLongBits>((vf)largest / set(kLargest));
  }
  ISO_INLINE vi code(vf x, vf scale) {
    const vf quotient = x / scale;
    return (vi)(limited(choose(quotient == quotient, quotient, set(0)), -kLargest, kLargest) + set(kIntegerPoint));
  }
};

// The numbers of a group as float32, those beyond the row's end 0.
ISO_INLINE void widen_group(const RoundCall& call, int64_t row, int64_t first, int64_t count, float* out) {
  const Operand& source = call.operands[0];
  const int64_t bytes = source.dtype == Dtype::f32 ? 4 : source.dtype == Dtype::bf16 ? 2 : 1;
  const auto* from = static_cast<const uint8_t*>(source.data) + (row * source.row_stride + first) * bytes;
  alignas(64) uint8_t whole[kRoundGroup * 4] = {};
  if (count < kRoundGroup) {
    __builtin_memcpy(whole, from, static_cast<size_t>(count * bytes));
    from = whole;
  }
  if (source.dtype == Dtype::f32) {
    __builtin_memcpy(out, from, kRoundGroup * 4);
  } else if (source.dtype == Dtype::bf16) {
    for (int i = 0; i < kRoundGroup; i += W)
      store(out + i, load_bf16_vector(reinterpret_cast<const uint16_t*>(from) + i));
  } else {
    const Operand& scales = call.operands[1];
    const vf scale =
        set(static_cast<const float*>(scales.data)[row / kScaleBlock * scales.row_stride + first / kScaleBlock]);
    alignas(64) uint32_t words[kRoundGroup];
    for (int i = 0; i < kRoundGroup; ++i) words[i] = static_cast<uint32_t>(kFp8Table.value[from[i]]) << 16;
    for (int i = 0; i < kRoundGroup; i += W) store(out + i, (vf)load_words(words + i) * scale);
    for (int64_t i = count; i < kRoundGroup; ++i) out[i] = 0;  // as its scale may be no number
  }
}

// W groups from `begin` on, as many of them as there are before `end`. Returns whether all numbers are finite.
template <class Form>
ISO_INLINE bool round_lanes(const RoundCall& call, int64_t groups, int64_t begin, int64_t end) {
  constexpr int kPerWord = 32 / Form::kBits, kWords = kRoundGroup / kPerWord;
  alignas(64) float numbers[W][kRoundGroup];
  vf x[kRoundGroup];
  const int count = static_cast<int>(least(W, end - begin));
  int64_t row = begin / groups, group = begin % groups;
  for (int i = 0; i < W; ++i) {
    if (i < count) {
      const int64_t first = group * kRoundGroup;
      widen_group(call, row, first, least(kRoundGroup, call.inputs - first), numbers[i]);
      if (++group == groups) ++row, group = 0;
    } else {
      __builtin_memset(numbers[i], 0, sizeof(numbers[i]));
    }
  }
  vi not_finite = set_word(0);
  for (int b = 0; b < kRoundGroup; b += W) {
    vi block[W];
    for (int i = 0; i < W; ++i) block[i] = load_words(numbers[i] + b);
    transpose(block);
    for (int i = 0; i < W; ++i) {
      x[b + i] = (vf)block[i];
      not_finite |= (block[i] & 0x7fffffff) >= 0x7f800000;
    }
  }
  const vf scale = Form::scale(x);
  alignas(64) uint32_t words[kWords][W];
  for (int w = 0; w < kWords; ++w) {
    vi word = set_word(0);
    for (int i = 0; i < kPerWord; ++i)
      word |= (Form::code(x[w * kPerWord + i], scale) & ((1 << Form::kBits) - 1)) << Form::kBits * i;
    store(reinterpret_cast<float*>(words[w]), (vf)word);
  }
  store_lanes(reinterpret_cast<uint32_t*>(call.scales + begin), (vi)scale, count);
  const int64_t row_bytes = (call.inputs * Form::kBits + 7) / 8;
  row = begin / groups, group = begin % groups;
  for (int i = 0; i < count; ++i) {
    uint32_t own[kWords];
    for (int w = 0; w < kWords; ++w) own[w] = words[w][i];
    uint8_t* const to = call.codes + row * row_bytes + group * sizeof(own);
    const int64_t left = least(kRoundGroup, call.inputs - group * kRoundGroup);
    if (left == kRoundGroup) {
      __builtin_memcpy(to, own, sizeof(own));
    } else {
      __builtin_memcpy(to, own, static_cast<size_t>((left * Form::kBits + 7) / 8));
      if (Form::kBits == 4 && left % 2 != 0) to[left / 2] &= 15;
    }
    if (++group == groups) ++row, group = 0;
  }
  uint32_t any = 0;
  for (int i = 0; i < W; ++i) any |= static_cast<uint32_t>(not_finite[i]);
  return any == 0;
}

template <class Form>
bool round_weight(Pool& pool, const RoundCall& call) {
  const int64_t groups = ceil_div(call.inputs, kRoundGroup), all = call.rows * groups;
  int finite = 1;
  auto chunk = [&](int64_t c) ISO_ATTR {
    const int64_t end = least((c + 1) * kRoundChunk, all);
    for (int64_t begin = c * kRoundChunk; begin < end; begin += W) {
      if (!round_lanes<Form>(call, groups, begin, end)) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
    }
  };
  parallel(pool, ceil_div(all, kRoundChunk), chunk);
  return finite != 0;
}
