// A few rows × a tile of FP8 weights on AVX2, decoded in registers.
//
// The seven lower bits of an e4m3 code are those of a float32 number 2^120 times as small, where they stand at its
// exponent's lower half; so a code costs shifts, a mask and an exact product. A NaN becomes a number that way, which is
// found out while a tile is read.

constexpr float kFp8Factor = 0x1p120f;

// Whether numbers can be multiplied by kFp8Factor.
ISO_INLINE bool below_2_to_7(const uint32_t* numbers, int64_t count) {
  vi largest = set_word(0);
  int64_t k = 0;
  for (; k + W <= count; k += W)
    largest = (vi)_mm256_max_epi32((__m256i)largest, (__m256i)(load_words(numbers + k) & 0x7fffffff));
  largest = (vi)_mm256_max_epi32((__m256i)largest, (__m256i)(load_lanes(numbers + k, count - k) & 0x7fffffff));
  return _mm256_movemask_ps((__m256)(largest >= (127 + 7) << 23)) == 0;
}

// Multiplies the rows of the only group of a product by kFp8Factor, where that is for its tiles to gain and can be
// done: then it is not the weights that must be.
template <class M>
ISO_INLINE void enlarge(const Linear& weight, Group& group) {
  if (kRowWords<M> != 2 || weight.kind != Kind::fp8) return;
  const int64_t count = weight.words * kRowWords<M> * group.rows;
  if (!below_2_to_7(group.words, count)) return;
  auto* numbers = reinterpret_cast<float*>(const_cast<uint32_t*>(group.words));
  int64_t k = 0;
  for (; k + W <= count; k += W) store(numbers + k, load(numbers + k) * set(kFp8Factor));
  for (; k < count; ++k) numbers[k] *= kFp8Factor;
  group.enlarged = true;
}

// What is multiplied by kFp8Factor: weights; inputs, as they are used; or it is inputs that have been (enlarge).
enum class Fp8Times { weights, inputs, nothing };

// Two vectors of outputs of half a word: 0, 2, 16, 18, 4, 6, 20, 22 and the ones after them, 8 more in the other half.
struct Fp8Half {
  vf even[2], odd[2];  // inputs of the word

  // Unless kTimes is weights, 2^120 times as small.
  template <Fp8Times kTimes>
  ISO_INLINE Fp8Half of(const uint8_t* codes, __m256i& largest) {
    const __m256i code = load_bytes(codes), bits = _mm256_set1_epi16(static_cast<short>(0x87f0));
    largest = _mm256_max_epu8(largest, _mm256_or_si256(code, _mm256_set1_epi8(static_cast<char>(0x80))));
    const vi odds = (vi)_mm256_and_si256(_mm256_srai_epi16(code, 4), bits),
             evens = (vi)_mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(code, 8), 4), bits);
    const vi high = set_word(0xffff0000u);
    if (kTimes != Fp8Times::weights)
      return Fp8Half{{(vf)(evens << 16), (vf)(evens & high)}, {(vf)(odds << 16), (vf)(odds & high)}};
    const vf factor = set(kFp8Factor);
    return Fp8Half{{(vf)(evens << 16) * factor, (vf)(evens & high) * factor},
                   {(vf)(odds << 16) * factor, (vf)(odds & high) * factor}};
  }
};

// Words [begin, begin + n) of kBlocks scale blocks at once, from `half` on kHalves halves of them: their sums, × scale,
// are added to those in `sums`, whose outputs stand in the order of Fp8Half.
template <int R, int kHalves, int kBlocks, Fp8Times kTimes>
ISO_INLINE void fp8_part(const uint8_t* codes, const float* scales, int64_t n, const uint32_t* a, float* sums,
                         const uint8_t* ahead, __m256i& largest) {
  vf own[kBlocks][kHalves][R][2] = {};
  constexpr int64_t kBlock = kScaleWords * 64;
  for (int64_t u = 0; u < n; ++u, codes += 64, a += 2 * R, ahead += 64) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t* x = a + b * kScaleWords * 2 * R;
      prefetch(ahead + b * kBlock);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        const Fp8Half weight = Fp8Half::of<kTimes>(codes + b * kBlock + h * 32, largest);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          vf even = (vf)set_word(load_word(x + r)), odd = (vf)set_word(load_word(x + R + r));
          if (kTimes == Fp8Times::inputs) even = even * set(kFp8Factor), odd = odd * set(kFp8Factor);
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v)
            own[b][h][r][v] = fma(weight.odd[v], odd, fma(weight.even[v], even, own[b][h][r][v]));
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          float* sum = sums + r * kTile + (2 * h + v) * W;
          store(sum, fma(own[b][h][r][v], set(scales[b]), load(sum)));
        }
      }
    }
  }
}

// `sums` with their outputs in order.
template <int R>
ISO_INLINE void fp8_order(float* sums) {
  for (int i = 0; i < R; ++i, sums += kTile) {
    const __m256 half[] = {(__m256)load(sums), (__m256)load(sums + W), (__m256)load(sums + 2 * W),
                           (__m256)load(sums + 3 * W)};
    store(sums, (vf)_mm256_unpacklo_ps(half[0], half[1]));
    store(sums + W, (vf)_mm256_unpacklo_ps(half[2], half[3]));
    store(sums + 2 * W, (vf)_mm256_unpackhi_ps(half[0], half[1]));
    store(sums + 3 * W, (vf)_mm256_unpackhi_ps(half[2], half[3]));
  }
}

// The sums of outputs that have a weight which is not a number.
static void without_numbers(const uint8_t* codes, int64_t words, int rows, float* sums) {
  for (int64_t i = 0; i < words * 64; ++i) {
    if ((codes[i] & 0x7f) != 0x7f) continue;
    for (int o = 0; o < kTile; ++o) {
      if (byte_place(o) != i % 64 / 2) continue;
      for (int r = 0; r < rows; ++r) sums[r * kTile + o] = __builtin_nanf("");
    }
  }
}

template <int R, Fp8Times kTimes>
static void fp8_direct(const uint8_t* codes, const float* scales, int64_t words, const uint32_t* a, float* sums,
                       const uint8_t* next) {
  for (int i = 0; i < R * kTile; i += W) store(sums + i, set(0.0f));
  const uint8_t* const tile = codes;
  __m256i largest = _mm256_setzero_si256();
  constexpr int kHalves = R == 1 ? 2 : 1, kBlocks = R <= 2 ? 2 : 1;  // so that sums need not wait for each other
  for (int64_t begin = 0; begin < words;) {
    const int64_t beyond = (begin - words) * 64 + kPrefetchWords * 4;
    const uint8_t* ahead = beyond < 0 ? codes + kPrefetchWords * 4 : next + beyond;
    const bool several = kBlocks > 1 && begin + kBlocks * kScaleWords <= words;
    const int64_t n = least(kScaleWords, words - begin);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h += kHalves) {
      const uint8_t* fetched = h == 0 ? ahead : codes;
      if (several) {
        fp8_part<R, kHalves, kBlocks, kTimes>(codes + h * 32, scales, n, a, sums + 2 * h * W, fetched, largest);
      } else {
        fp8_part<R, kHalves, 1, kTimes>(codes + h * 32, scales, n, a, sums + 2 * h * W, fetched, largest);
      }
    }
    const int64_t blocks = several ? kBlocks : 1;
    codes += blocks * n * 64, a += blocks * n * 2 * R, begin += blocks * n, scales += blocks;
  }
  fp8_order<R>(sums);
  if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, _mm256_set1_epi8(-1))) != 0)
    without_numbers(tile, words, R, sums);
}

static void fp8_few(const uint8_t* codes, const float* scales, int64_t words, const Group& group, float* sums,
                    const uint8_t* next) {
  if (group.rows == 1 && !group.enlarged && below_2_to_7(group.words, 2 * words))  // two products instead of eight
    return fp8_direct<1, Fp8Times::inputs>(codes, scales, words, group.words, sums, next);
  switch (group.rows) {
#define ISO_CASE(R)                                                                                         \
  case R:                                                                                                   \
    return group.enlarged ? fp8_direct<R, Fp8Times::nothing>(codes, scales, words, group.words, sums, next) \
                          : fp8_direct<R, Fp8Times::weights>(codes, scales, words, group.words, sums, next);
    ISO_CASE(1)
    ISO_CASE(2)
    ISO_CASE(3)
    ISO_CASE(4)
    ISO_CASE(5)
    ISO_CASE(6)
#undef ISO_CASE
    default:
      break;
  }
}
