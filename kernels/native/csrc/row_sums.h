// Sums against weights that are decoded in registers.

constexpr int kTileVectors = kTile / W;

// Of R rows, a word at a time.
template <int R>
struct RowSums {
  vf sums[R][kTileVectors] = {};
#if ISO_AMX
  vf even[R][kTileVectors] = {}, odd[R][kTileVectors] = {};
  int taken = 0;  // words of the step
#endif

  ISO_INLINE_MEMBER void add(const vi* weight, const uint32_t* a) {
#if ISO_AMX || ISO_W == 8
    const vi high = set_word(0xffff0000u);
#endif
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#if ISO_W == 8
      const vf even = (vf)set_word(load_word(a + r)), odd = (vf)set_word(load_word(a + R + r));
#else
      const vi x = set_word(load_word(a + r));
#endif
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
#if ISO_AMX
        even[r][v] = fma((vf)(weight[v] << 16), (vf)(x << 16), even[r][v]);
        odd[r][v] = fma((vf)(weight[v] & high), (vf)(x & high), odd[r][v]);
#elif ISO_W == 8
        sums[r][v] = fma((vf)(weight[v] & high), odd, fma((vf)(weight[v] << 16), even, sums[r][v]));
#else
        sums[r][v] = dot_bf16(sums[r][v], weight[v], x);
#endif
      }
    }
#if ISO_AMX
    if (++taken == kStepWords) finish();
#endif
  }

  // After the last word.
  ISO_INLINE_MEMBER void finish() {
#if ISO_AMX
    if (taken == 0) return;
    taken = 0;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        sums[r][v] = sums[r][v] + (even[r][v] + odd[r][v]);
        even[r][v] = odd[r][v] = set(0.0f);
      }
    }
#endif
  }

  // Adds them to `to`, [row][32], each × the scale of its output.
  ISO_INLINE_MEMBER void add_scaled(float* to, const vf* scale) {
    finish();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        float* sum = to + r * kTile + v * W;
        store(sum, fma(sums[r][v], scale[v], load(sum)));
      }
    }
  }
};
