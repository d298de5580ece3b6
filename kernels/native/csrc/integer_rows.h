// Rows as integers: those whose inputs share scales are one power of two × whole numbers of 30 bits, each in an upper
// half and what that leaves, which is 0 for all inputs but those below some 2^-8 of the largest.

constexpr int kHalfBits = 15;

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

// `words` words of `rows` rows whose inputs share scales, as floats → the upper halves, what the sums need, and by word
// the lower halves that are not 0. → How many.
template <bool kOne>
ISO_INLINE int to_integers(const uint32_t* floats, int64_t words, int rows, uint32_t* high, LowerHalves* low,
                           RowScale* scales) {
  vi exponent = largest_bits<kOne>(floats, words, rows) >> 7;
  exponent = exponent > 30 ? exponent : set_word(30);
  const vf factor = (vf)((283 - exponent) << 23);  // the largest lies just below 2^30
  const vf scale = exponent == 255 ? set(__builtin_nanf("")) : (vf)((exponent - 29) << 23);
  vi high_sum = set_word(0), low_sum = high_sum;
  int count = 0;
  for (int64_t u = 0; u < words; u += kOne ? W : 1) {
    const int valid = static_cast<int>(kOne ? least(W, words - u) : rows);
    vi both[2], part[2], rest[2];
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
      const vi whole = (vi)_mm256_cvtps_epi32((__m256)((vf)both[i] * factor));
      part[i] = (whole + (1 << (kHalfBits - 1))) >> kHalfBits;
      rest[i] = whole - (part[i] << kHalfBits);
      high_sum += part[i], low_sum += rest[i];
    }
    store_lanes(high + u * rows, (part[0] & 0xffff) | part[1] << 16, valid);
    const vi lower = (rest[0] & 0xffff) | rest[1] << 16;
    const int zero = _mm256_movemask_ps((__m256)(lower == 0));
    for (unsigned left = ~static_cast<unsigned>(zero) & 0xff; left != 0; left &= left - 1) {
      const int i = __builtin_ctz(left);
      low[count++] = LowerHalves{static_cast<uint32_t>(lower[i]), static_cast<uint16_t>(kOne ? u + i : u),
                                 static_cast<uint16_t>(kOne ? 0 : i)};
    }
  }
  if (kOne) {
    int32_t sums[2] = {};
    for (int i = 0; i < W; ++i) sums[0] += high_sum[i], sums[1] += low_sum[i];
    *scales = RowScale{scale[0], sums[0], sums[1]};
  } else {
    for (int i = 0; i < rows; ++i) scales[i] = RowScale{scale[i], high_sum[i], low_sum[i]};
  }
  return count;
}

// Copies lower halves row by row.
ISO_INLINE void order_by_row(const LowerHalves* from, int count, int rows, LowerHalves* to) {
  for (int r = 0; r < rows && count > 0; ++r) {
    for (int i = 0; i < count; ++i) {
      if (from[i].row == r) *to++ = from[i];
    }
  }
}

ISO_INLINE bool takes_integers(const Linear& weight) { return weight.kind == Kind::int4 || weight.kind == Kind::int8; }

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
    upper_ = scratch_of<uint32_t>(kWholes, rows * words + count * W);
    lower_ = scratch_of<LowerHalves>(kWholeLower, 2 * rows * words);
    scales_ = scratch_of<RowScale>(kWholeScales, rows * parts_);
    places_ = scratch_of<int32_t>(kWholePlaces, count * (parts_ + 1));
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
    uint32_t* high = upper_ + before * words_ + g * W;
    LowerHalves *low = lower_ + 2 * before * words_, *found = n == 1 ? low : low + n * words_;
    RowScale* scales = scales_ + before * parts_;
    int32_t *places = places_ + g * (parts_ + 1), entry = 0;
    to_[g] = Group{high, n, n, from.first, scales, low, places};
    for (int64_t begin = 0; begin < weight.words; begin += group_words, scales += n) {
      const int64_t here = least(group_words, weight.words - begin);
      const uint32_t* floats = from.words + 2 * begin * n;
      *places++ = entry;
      if (n == 1) {
        entry += to_integers<true>(floats, here, 1, high + begin, found + entry, scales);
      } else {
        const int count = to_integers<false>(floats, here, n, high + begin * n, found, scales);
        order_by_row(found, count, n, low + entry);
        entry += count;
      }
    }
    *places = entry;
  }

 private:
  const Group* from_;
  Group* to_ = nullptr;
  int64_t words_, parts_ = 0;
  uint32_t* upper_ = nullptr;
  LowerHalves* lower_ = nullptr;
  RowScale* scales_ = nullptr;
  int32_t* places_ = nullptr;
};
