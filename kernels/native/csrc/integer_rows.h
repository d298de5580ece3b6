// Rows as integers: those whose inputs share scales are one power of two × whole numbers of 16 bits.
//
// A bfloat16 number of at least 2^-7 of the largest beside it is exact; of others what is left off is at most 2^-15 of
// the largest. Rounding the largest itself to bfloat16 leaves off up to 2^-9 of it, and the step of an eight-bit weight
// is 2^-7 of its range.

constexpr int kWholeBits = 15;  // and the sign

// The largest magnitude among the inputs, its upper 16 bits: of lanes of rows, or with kOne, where lanes are inputs, of
// all.
template <bool kOne>
ISO_INLINE vi largest_bits(const uint32_t* floats, int64_t words, int rows) {
  vi largest = set_word(0);
  const auto add = [&](const uint32_t* p, int64_t valid) ISO_ATTR {
    largest = (vi)_mm256_max_epi32((__m256i)largest, (__m256i)(load_lanes(p, valid) & 0x7fffffff));
  };
  if (kOne) {
    for (int64_t k = 0; k < 2 * words; k += W) add(floats + k, 2 * words - k);
    int most_of_all = 0;
    for (int i = 0; i < W; ++i) most_of_all = largest[i] > most_of_all ? largest[i] : most_of_all;
    largest = set_word(static_cast<uint32_t>(most_of_all));
  } else {
    for (int64_t k = 0; k < 2 * words; ++k) add(floats + k * rows, rows);
  }
  return largest >> 16;
}

// `words` words of `rows` rows whose inputs share scales, as floats → as pairs of integers, and what the sums need.
template <bool kOne>
ISO_INLINE void to_integers(const uint32_t* floats, int64_t words, int rows, uint32_t* out, RowScale* scales) {
  constexpr int kBelow = kWholeBits - 1;  // of the exponents of an integer's ones, the largest
  vi exponent = largest_bits<kOne>(floats, words, rows) >> 7;
  exponent = exponent > kWholeBits ? exponent : set_word(kWholeBits);
  const vf factor = (vf)((2 * 127 + kBelow - exponent) << 23);  // the largest lies just below 2^kWholeBits
  const vf scale = exponent == 255 ? set(__builtin_nanf("")) : (vf)((exponent - kBelow) << 23);
  vi sum = set_word(0);
  for (int64_t u = 0; u < words; u += kOne ? W : 1) {
    const int valid = static_cast<int>(kOne ? least(W, words - u) : rows);
    vi both[2];
    if (kOne) {
      const vi one = load_lanes(floats + 2 * u, 2 * valid), two = load_lanes(floats + 2 * u + W, 2 * valid - W);
      const vi order = {0, 2, 4, 6, 1, 3, 5, 7};
      const __m256i a = _mm256_permutevar8x32_epi32((__m256i)one, (__m256i)order),
                    b = _mm256_permutevar8x32_epi32((__m256i)two, (__m256i)order);
      both[0] = (vi)_mm256_permute2x128_si256(a, b, 0x20), both[1] = (vi)_mm256_permute2x128_si256(a, b, 0x31);
    } else {
      both[0] = load_lanes(floats + 2 * u * rows, rows), both[1] = load_lanes(floats + (2 * u + 1) * rows, rows);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      both[i] = (vi)_mm256_cvtps_epi32((__m256)((vf)both[i] * factor));
      sum += both[i];
    }
    store_lanes(out + u * rows, (both[0] & 0xffff) | both[1] << 16, valid);
  }
  if (kOne) {
    int32_t total = 0;
    for (int i = 0; i < W; ++i) total += sum[i];
    *scales = RowScale{scale[0], total};
  } else {
    for (int i = 0; i < rows; ++i) scales[i] = RowScale{scale[i], sum[i]};
  }
}

ISO_INLINE bool takes_integers(const Linear& weight) { return is_grouped(weight.kind); }

// Groups as products with weights take them, made once for a product: other ones where those are integers. They are the
// calling thread's until it makes others.
template <class M>
class TakenGroups {
 public:
  // `rows`: of all groups. `words`: of the weights'. `integers`: whether any of those is one of integers.
  TakenGroups(const Group* groups, int64_t count, int64_t rows, int64_t words, bool integers)
      : from_(groups), words_(words) {
    if (M::f32 || !integers) return;
    parts_ = ceil_div(words, kLeastGroupWords);
    to_ = scratch_of<Group>(kWholeGroups, count);
    wholes_ = scratch_of<uint32_t>(kWholes, rows * words + count * W);
    scales_ = scratch_of<RowScale>(kWholeScales, rows * parts_);
  }

  const Group* groups() const { return to_ == nullptr ? from_ : to_; }
  bool made() const { return to_ != nullptr; }  // whether there is anything to make

  // Makes group g, which will be multiplied by this weight. By any thread.
  void make(const Linear& weight, int64_t g) const {
    if (to_ == nullptr) return;
    const Group& from = from_[g];
    if (!takes_integers(weight)) {
      to_[g] = from;
      return;
    }
    const int n = from.rows;
    const int64_t group_words = weight.grouping.inputs / 2, before = from.first;
    uint32_t* wholes = wholes_ + before * words_ + g * W;
    RowScale* scales = scales_ + before * parts_;
    to_[g] = Group{wholes, n, n, from.first, scales};
    for (int64_t begin = 0; begin < weight.words; begin += group_words, scales += n) {
      const int64_t here = least(group_words, weight.words - begin);
      const uint32_t* floats = from.words + 2 * begin * n;
      if (n == 1) {
        to_integers<true>(floats, here, 1, wholes + begin, scales);
      } else {
        to_integers<false>(floats, here, n, wholes + begin * n, scales);
      }
    }
  }

 private:
  const Group* from_;
  Group* to_ = nullptr;
  int64_t words_, parts_ = 0;
  uint32_t* wholes_ = nullptr;
  RowScale* scales_ = nullptr;
};
