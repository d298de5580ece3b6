// Products of bfloat16 rows with a tile on AMX: a step takes 16 words of up to 16 rows against 16 outputs.
//
// A step sums its even elements and its odd ones apart, in ascending order, and then adds both to the accumulator
// (TDPBF16PS in Intel's manual): another order than AVX512-BF16's, and so an instruction set of its own. What stands in
// another row changes nothing.

constexpr int kStepWords = 16;

// The tile registers of the calling thread while it lives: 0 and 1 for sums of 16 outputs each, 2 for rows, 3 and 4 for
// weights. Nothing in between may configure them otherwise.
class TileRegisters {
 public:
  ISO_INLINE_MEMBER explicit TileRegisters(int rows) {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
      uint8_t rows[16] = {0, 0, 0, kStepWords, kStepWords};
    } c;
    for (int i = 0; i < 3; ++i) c.rows[i] = static_cast<uint8_t>(rows);
    asm volatile("ldtilecfg %0" : : "m"(c) : "memory");
  }
  ISO_INLINE_MEMBER ~TileRegisters() { asm volatile("tilerelease" : : : "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// The words after the last whole step, in the order of one.
ISO_INLINE void add_rest(const uint32_t* w, const uint32_t* a, int64_t a_stride, int rows, int64_t words, float* sums) {
  const vi high = set_word(0xffff0000u);
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < kTile; o += W) {
      vf even = set(0.0f), odd = set(0.0f);
      for (int64_t u = 0; u < words; ++u) {
        const vi weight = load_words(w + u * kTile + o), x = set_word(load_word(a + r * a_stride + u));
        even = fma((vf)(weight << 16), (vf)(x << 16), even);
        odd = fma((vf)(weight & high), (vf)(x & high), odd);
      }
      float* sum = sums + r * kTile + o;
      store(sum, load(sum) + (even + odd));
    }
  }
}

// `words` words of the rows for which TileRegisters were made, `a_stride` apart, against a tile's. What is written of
// the sums of rows beyond `rows` means nothing; scaled ones are not written. The compiler's own functions for these
// instructions do not say that they read and write memory.
template <Fetch kFetch>
ISO_INLINE void multiply_steps(const uint32_t* w, const uint32_t* a, int64_t a_stride, int rows, int64_t words,
                               float* sums, Into into, const float* scales, const uint32_t* next) {
  static_assert(kTile == 2 * kStepWords && W == kStepWords);
  constexpr int64_t kRowBytes = kTile * sizeof(float);
  const int64_t turn = words * kTile - kPrefetchWords;
  if (into == Into::add) {
    asm volatile("tileloadd (%0,%1,1), %%tmm0\n\ttileloadd (%2,%1,1), %%tmm1"
                 :
                 : "r"(sums), "r"(kRowBytes), "r"(sums + W)
                 : "memory");
  } else {
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1" : : : "memory");
  }
  int64_t u = 0;
  for (; u + kStepWords <= words; u += kStepWords, w += kStepWords * kTile, a += kStepWords) {
    if (kFetch == Fetch::stream) {
      const int64_t beyond = u * kTile - turn;
      const uint32_t* ahead = beyond < 0 ? w + kPrefetchWords : next + beyond;
      for (int i = 0; i < kStepWords * kTile; i += 16) prefetch(ahead + i);
    }
    if (kFetch == Fetch::line) {
      for (int i = 0; i < kStepWords; ++i) prefetch(next + (u + i) * 16);
    }
    asm volatile(
        "tileloadd (%0,%1,1), %%tmm2\n\ttileloadd (%2,%3,1), %%tmm3\n\ttileloadd (%4,%3,1), %%tmm4\n\t"
        "tdpbf16ps %%tmm3, %%tmm2, %%tmm0\n\ttdpbf16ps %%tmm4, %%tmm2, %%tmm1"
        :
        : "r"(a), "r"(a_stride * 4), "r"(w), "r"(kRowBytes), "r"(w + W)
        : "memory");
  }
  alignas(64) float apart[kGroup * kTile];
  float* to = into == Into::scaled ? apart : sums;
  asm volatile("tilestored %%tmm0, (%0,%1,1)\n\ttilestored %%tmm1, (%2,%1,1)"
               :
               : "r"(to), "r"(kRowBytes), "r"(to + W)
               : "memory");
  if (u < words) add_rest(w, a, a_stride, rows, words - u, to);
  if (into != Into::scaled) return;
  const vf first = load(scales), second = load(scales + W);
  for (int r = 0; r < rows; ++r, sums += kTile, to += kTile) {
    store(sums, fma(load(to), first, load(sums)));
    store(sums + W, fma(load(to + W), second, load(sums + W)));
  }
}
