// A few rows × a tile of FP8 weights on AVX2, decoded in registers.
//
// The seven lower bits of an e4m3 code are those of a float32 number 2^120 times as small, where they stand at its
// exponent's lower half; so a code costs shifts, a mask and an exact product. A NaN becomes a number that way: a tile
// that has one must be multiplied otherwise, and is found out while it is read.

// Two vectors of outputs of half a word: 0, 2, 16, 18, 4, 6, 20, 22 and the ones after them, 8 more in the other half.
struct Fp8Half {
  vf even[2], odd[2];  // inputs of the word

  ISO_INLINE Fp8Half of(const uint8_t* codes, __m256i& largest) {
    const __m256i code = load_bytes(codes), bits = _mm256_set1_epi16(static_cast<short>(0x87f0));
    largest = _mm256_max_epu8(largest, _mm256_or_si256(code, _mm256_set1_epi8(static_cast<char>(0x80))));
    const vi odds = (vi)_mm256_and_si256(_mm256_srai_epi16(code, 4), bits),
             evens = (vi)_mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(code, 8), 4), bits);
    const vi high = set_word(0xffff0000u);
    const vf factor = set(0x1p120f);
    return Fp8Half{{(vf)(evens << 16) * factor, (vf)(evens & high) * factor},
                   {(vf)(odds << 16) * factor, (vf)(odds & high) * factor}};
  }
};

// Words [begin, begin + n) of kBlocks scale blocks at once, from `half` on kHalves halves of them: their sums, × scale,
// are added to those in `sums`, whose outputs stand in the order of Fp8Half.
template <int R, int kHalves, int kBlocks>
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
        const Fp8Half weight = Fp8Half::of(codes + b * kBlock + h * 32, largest);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const vf even = (vf)set_word(load_word(x + r)), odd = (vf)set_word(load_word(x + R + r));
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
template <int R>
static bool fp8_direct(const uint8_t* codes, const float* scales, int64_t words, const uint32_t* a, float* sums,
                       const uint8_t* next) {
  for (int i = 0; i < R * kTile; i += W) store(sums + i, set(0.0f));
  __m256i largest = _mm256_setzero_si256();
  constexpr int kHalves = R <= 2 ? 2 : 1;
  for (int64_t begin = 0; begin < words;) {
    const int64_t beyond = (begin - words) * 64 + kPrefetchWords * 4;
    const uint8_t* ahead = beyond < 0 ? codes + kPrefetchWords * 4 : next + beyond;
    int64_t done = least(kScaleWords, words - begin);
    if (R == 1 && begin + 2 * kScaleWords <= words) {
      fp8_part<R, kHalves, R == 1 ? 2 : 1>(codes, scales, done, a, sums, ahead, largest);
      done = 2 * kScaleWords, ++scales;
    } else {
#pragma GCC unroll 2
      for (int h = 0; h < 2; h += kHalves)
        fp8_part<R, kHalves, 1>(codes + h * 32, scales, done, a, sums + 2 * h * W, h == 0 ? ahead : codes, largest);
    }
    codes += done * 64, a += done * 2 * R, begin += done, ++scales;
  }
  fp8_order<R>(sums);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, _mm256_set1_epi8(-1))) == 0;
}

static bool fp8_few(const uint8_t* codes, const float* scales, int64_t words, const Group& group, float* sums,
                    const uint8_t* next) {
  switch (group.rows) {
#define ISO_CASE(R) \
  case R:           \
    return fp8_direct<R>(codes, scales, words, group.words, sums, next);
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
