// A few rows × a tile of FP8 weights on AVX2, decoded in registers.
//
// The seven lower bits of an e4m3 code are those of a float32 number 2^120 times as small, where they stand at its
// exponent's lower half; so a code costs shifts, a mask and an exact product. A NaN becomes a number that way: a tile
// that has one must be multiplied otherwise, and is found out while it is read.

constexpr float kFp8Factor = 0x1p120f;

// Whether the numbers of a row can be multiplied by kFp8Factor.
ISO_INLINE bool below_2_to_7(const uint32_t* row, int64_t words) {
  vi largest = set_word(0);
  int64_t k = 0;
  for (; k + W <= 2 * words; k += W)
    largest = (vi)_mm256_max_epi32((__m256i)largest, (__m256i)(load_words(row + k) & 0x7fffffff));
  largest = (vi)_mm256_max_epi32((__m256i)largest, (__m256i)(load_lanes(row + k, 2 * words - k) & 0x7fffffff));
  return _mm256_movemask_ps((__m256)(largest >= (127 + 7) << 23)) == 0;
}

// Two vectors of outputs of half a word: 0, 2, 16, 18, 4, 6, 20, 22 and the ones after them, 8 more in the other half.
struct Fp8Half {
  vf even[2], odd[2];  // inputs of the word

  // Where kTiny, 2^120 times as small.
  template <bool kTiny>
  ISO_INLINE Fp8Half of(const uint8_t* codes, __m256i& largest) {
    const __m256i code = load_bytes(codes), bits = _mm256_set1_epi16(static_cast<short>(0x87f0));
    largest = _mm256_max_epu8(largest, _mm256_or_si256(code, _mm256_set1_epi8(static_cast<char>(0x80))));
    const vi odds = (vi)_mm256_and_si256(_mm256_srai_epi16(code, 4), bits),
             evens = (vi)_mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(code, 8), 4), bits);
    const vi high = set_word(0xffff0000u);
    if (kTiny) return Fp8Half{{(vf)(evens << 16), (vf)(evens & high)}, {(vf)(odds << 16), (vf)(odds & high)}};
    const vf factor = set(kFp8Factor);
    return Fp8Half{{(vf)(evens << 16) * factor, (vf)(evens & high) * factor},
                   {(vf)(odds << 16) * factor, (vf)(odds & high) * factor}};
  }
};

// Words [begin, begin + n) of kBlocks scale blocks at once, from `half` on kHalves halves of them: their sums, × scale,
// are added to those in `sums`, whose outputs stand in the order of Fp8Half.
template <int R, int kHalves, int kBlocks, bool kTiny>
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
        const Fp8Half weight = Fp8Half::of<kTiny>(codes + b * kBlock + h * 32, largest);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          vf even = (vf)set_word(load_word(x + r)), odd = (vf)set_word(load_word(x + R + r));
          if (kTiny) even = even * set(kFp8Factor), odd = odd * set(kFp8Factor);
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

// False: a weight is not a number, and `sums` mean nothing.
template <int R, bool kTiny>
static bool fp8_direct(const uint8_t* codes, const float* scales, int64_t words, const uint32_t* a, float* sums,
                       const uint8_t* next) {
  for (int i = 0; i < R * kTile; i += W) store(sums + i, set(0.0f));
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
        fp8_part<R, kHalves, kBlocks, kTiny>(codes + h * 32, scales, n, a, sums + 2 * h * W, fetched, largest);
      } else {
        fp8_part<R, kHalves, 1, kTiny>(codes + h * 32, scales, n, a, sums + 2 * h * W, fetched, largest);
      }
    }
    const int64_t blocks = several ? kBlocks : 1;
    codes += blocks * n * 64, a += blocks * n * 2 * R, begin += blocks * n, scales += blocks;
  }
  fp8_order<R>(sums);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, _mm256_set1_epi8(-1))) == 0;
}

static bool fp8_few(const uint8_t* codes, const float* scales, int64_t words, const Group& group, float* sums,
                    const uint8_t* next) {
  if (group.rows == 1 && below_2_to_7(group.words, words))  // two products with the row's numbers instead of eight
    return fp8_direct<1, true>(codes, scales, words, group.words, sums, next);
  switch (group.rows) {
#define ISO_CASE(R) \
  case R:           \
    return fp8_direct<R, false>(codes, scales, words, group.words, sums, next);
    ISO_CASE(1)
    ISO_CASE(2)
    ISO_CASE(3)
    ISO_CASE(4)
    ISO_CASE(5)
    ISO_CASE(6)
#undef ISO_CASE
    default:
      return false;
  }
}
