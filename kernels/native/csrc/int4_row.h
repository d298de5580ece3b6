// One row against int4 on AMX, to the bits of its tile registers without them (RowSums): weights are made float32 at
// once, and so are the row's numbers, a step of them for all its outputs. bfloat16 in between would take a quarter more
// instructions.
//
// Of each 32 bits of a word's codes (byte_place) the lower half is of one output and the upper of another. So sums are
// kept of 16 such outputs each, `lower` and `upper`, and brought into order where the scale is applied.

struct RowStep {
  alignas(64) float even[kStepWords], odd[kStepWords];

  ISO_INLINE_MEMBER explicit RowStep(const uint32_t* words) {
    const vi x = load_words(words);
    store(even, (vf)(x << 16));
    store(odd, (vf)(x & set_word(0xffff0000u)));
    asm volatile(""
                 :
                 : "r"(even), "r"(odd)
                 : "memory");  // broadcast from here: out of registers it takes a shuffle each
  }
};

struct SplitSums {
  vf lower = {}, upper = {};

  // Outputs 0 .. 15 and 16 .. 31.
  ISO_INLINE_MEMBER void in_order(vf* out) const {
    out[0] = (vf)_mm512_unpacklo_ps((__m512)lower, (__m512)upper);
    out[1] = (vf)_mm512_unpackhi_ps((__m512)lower, (__m512)upper);
  }
};

// A lookup takes the lowest four bits of an index.
struct Int4Row {
  vf values;  // of codes 0 .. 15

  ISO_INLINE Int4Row make() {
    alignas(64) float of[16];
    for (int code = 0; code < 16; ++code) of[code] = static_cast<float>(code - 8);
    return Int4Row{load(of)};
  }

  ISO_INLINE_MEMBER vf weight(vi codes, int shift) const {
    return (vf)_mm512_permutexvar_ps((__m512i)(codes >> shift), (__m512)values);
  }

  ISO_INLINE_MEMBER void step(const uint8_t* block, const RowStep& row, SplitSums& sums, const uint8_t* ahead) const {
    vf even[2] = {}, odd[2] = {};
#pragma GCC unroll 8
    for (int u = 0; u < kStepWords; u += 2, block += 64, ahead += 64) {
      prefetch(ahead);
      const vi codes = load_words(reinterpret_cast<const uint32_t*>(block));
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const vf x_even = set(row.even[u + i]), x_odd = set(row.odd[u + i]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          even[half] = fma(weight(codes, 16 * half + 4 * i), x_even, even[half]);
          odd[half] = fma(weight(codes, 16 * half + 8 + 4 * i), x_odd, odd[half]);
        }
      }
    }
    sums.lower = sums.lower + (even[0] + odd[0]);
    sums.upper = sums.upper + (even[1] + odd[1]);
  }
};
