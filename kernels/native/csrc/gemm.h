// The matrix product that everything else is built from: up to kGroup rows against one tile of 32 outputs, or a part of
// K of one.
//
// One accumulator per (row, output) runs over the words of K in ascending order. Neither the number of rows, nor their
// places, nor how the work is cut into blocks changes that order, so a row's result is the same bits in any company.
// What has scales sums the inputs of each apart, then adds sum × scale.

constexpr int64_t kBlockWords =
    ISO_W == 8 ? 64 : 128;  // 16 KiB of a tile stay in the first cache while several groups pass over them

enum class Into { zero, add };  // sums start at 0; go on from `sums`

// What the inner loop fetches meanwhile: nothing; the weights kPrefetchWords ahead and near their end `next`; a cache
// line of `next` with each word.
enum class Fetch { none, stream, line };

// How many vectors of outputs R rows are multiplied by at once.
template <int R>
constexpr int kVectors = ISO_W == 8 && R <= 2 ? 4 : kVectorBlock;

// sums + R rows × a word of V vectors of outputs. A row's words are `a_stride` apart.
template <class M, int R, int V>
ISO_INLINE void add_word(vf (&sums)[R][V], const uint32_t* w, const uint32_t* a, int64_t a_stride) {
  if constexpr (kRowWords<M> == 2) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, a += a_stride) {
      vf weight[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const vi word = load_words(w + v * W);
        weight[v] = (vf)(half == 0 ? word << 16 : word & set_word(0xffff0000u));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf x = (vf)set_word(load_word(a + r));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = fma(weight[v], x, sums[r][v]);
      }
#if ISO_W == 8
      // Or GCC does both halves at once, for which there are too few registers.
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) asm volatile("" : "+x"(sums[r][v]));
      }
#endif
    }
    return;
  }
  vi weight[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) weight[v] = load_words(w + v * W);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const vi x = set_word(load_word(a + r));
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = M::dot(sums[r][v], weight[v], x);
  }
}

// `words` words of `R` rows against kVectorBlock vectors of outputs. Weight words lie `w_stride` apart, sums of a row
// `sum_stride`. A stream is prefetched: kPrefetchWords ahead, and near its end what will be read next, at `next`.
template <class M, int R, Fetch kFetch>
ISO_INLINE void block(const uint32_t* w, int64_t w_stride, const uint32_t* a, int64_t a_stride, int64_t words,
                      float* sums, int64_t sum_stride, Into into, const uint32_t* next) {
  constexpr int V = kVectors<R>;
  const int64_t turn = words - kPrefetchWords / kTile;
  const uint32_t* ahead = kFetch == Fetch::stream && turn > 0 ? w + kPrefetchWords : next;
  vf c[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[r][v] = into == Into::add ? load(sums + r * sum_stride + v * W) : set(0.0f);
  }
  for (int64_t u = 0; u < words; ++u) {
    if (kFetch == Fetch::stream) {
      prefetch(ahead);
      if (V * W > 16) prefetch(ahead + 16);
      ahead = u + 1 == turn ? next : ahead + w_stride;
    }
    if (kFetch == Fetch::line) {
      prefetch(ahead);
      ahead += 16;
    }
    add_word<M>(c, w, a, a_stride);
    w += w_stride;
    a += kRowWords<M> * a_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sums + r * sum_stride + v * W, c[r][v]);
  }
}

// The same, the sums of `scale_words` words apart: each is added to the row's in `sums`, × its scale. scales
// [⌈words / scale_words⌉][32]. `following`: the rows that come after them, which are fetched meanwhile.
template <class M, int R>
ISO_INLINE void scaled_block(const uint32_t* w, const uint32_t* a, int64_t a_stride, int64_t words, int64_t scale_words,
                             float* sums, const float* scales, const uint32_t* following) {
  constexpr int V = kVectors<R>;
  for (; words > 0; words -= scale_words, scales += kTile) {
    vf c[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = set(0.0f);
    }
    for (int64_t u = least(scale_words, words); u > 0; --u) {
      add_word<M>(c, w, a, a_stride);
      w += kTile;
      a += kRowWords<M> * a_stride;
      if (ISO_W == 8) prefetch(following), following += a_stride;
    }
    vf scale[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) scale[v] = load(scales + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* sum = sums + r * kTile + v * W;
        store(sum, fma(c[r][v], scale[v], load(sum)));
      }
    }
  }
}

// The same to the same bits for few enough rows that what was added up stays in registers too.
template <class M, int R>
ISO_INLINE void held_block(const uint32_t* w, const uint32_t* a, int64_t a_stride, int64_t words, int64_t scale_words,
                           float* sums, const float* scales) {
  constexpr int V = kVectors<R>;
  vf total[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[r][v] = load(sums + r * kTile + v * W);
  }
  for (; words > 0; words -= scale_words, scales += kTile) {
    vf c[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = set(0.0f);
    }
    for (int64_t u = least(scale_words, words); u > 0; --u) {
      add_word<M>(c, w, a, a_stride);
      w += kTile;
      a += kRowWords<M> * a_stride;
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const vf scale = load(scales + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) total[r][v] = fma(c[r][v], scale, total[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sums + r * kTile + v * W, total[r][v]);
  }
}

// Calls `body` with the rows [r, r + R) of each block of nearly one size, R as a constant.
template <class F>
ISO_INLINE void row_blocks(int rows, F body, int most_rows = kRowBlock) {
  const int step = static_cast<int>(ceil_div(rows, most(1, ceil_div(rows, most_rows))));
  for (int r = 0; r < rows; r += step) {
    switch (rows - r < step ? rows - r : step) {
#define ISO_CASE(R)                            \
  case R:                                      \
    body(r, std::integral_constant<int, R>()); \
    break;
      ISO_CASE(1)
      ISO_CASE(2)
      ISO_CASE(3)
      ISO_CASE(4)
      ISO_CASE(5)
      ISO_CASE(6)
#if ISO_W == 16
      ISO_CASE(7)
      ISO_CASE(8)
      ISO_CASE(9)
      ISO_CASE(10)
      ISO_CASE(11)
      ISO_CASE(12)
#endif
#undef ISO_CASE
      default:
        break;
    }
  }
}

#if ISO_W == 8
#define ISO_APART __attribute__((noinline))  // inlined into attention, GCC keeps sums of it in memory
#else
#define ISO_APART
#endif

// Any number of rows up to kGroup, `outputs` a multiple of 32.
template <class M, Fetch kFetch>
ISO_APART static void multiply(const uint32_t* w, int64_t w_stride, const uint32_t* a, int64_t a_stride, int rows,
                               int64_t words, int64_t outputs, float* sums, int64_t sum_stride, Into into,
                               const uint32_t* next = nullptr) {
  row_blocks(rows, [&](int r, auto block_rows) ISO_ATTR {
    constexpr int R = decltype(block_rows)::value;
    for (int64_t o = 0; o < outputs; o += kVectors<R> * W) {
      block<M, R, kFetch>(w + o, w_stride, a + r, a_stride, words, sums + r * sum_stride + o, sum_stride, into,
                          kFetch == Fetch::none ? nullptr : next + o);
    }
  });
}

// A tile among those that are multiplied at once: where its sums go, and what will be read after it.
struct Strip {
  int64_t tile;
  float* sums;
  const uint8_t* next;
};

#if ISO_AMX
#include "amx.h"

// Words `begin` and on of a group, and its part of the sums of all.
template <class M>
ISO_INLINE TileRows tile_rows(const Group* groups, int64_t g, int64_t begin, float* sums) {
  const Group& group = groups[g];
  return TileRows{words_from<M>(group, begin), group.stride, group.rows,
                  sums + (group.first - groups[0].first) * kTile};
}
#else
// Nothing: the registers of other instruction sets need no preparation.
class TileRegisters {
 public:
  ISO_INLINE_MEMBER explicit TileRegisters(int) {}
};
#endif

// What the calling thread holds while it multiplies these groups by tiles.
ISO_INLINE TileRegisters registers_for(const Group* groups, int64_t count) {
  return TileRegisters(count == 1 ? groups[0].rows : kGroup);
}

// Words [begin, begin + n) of the rows of groups against those of a tile, `w` on. Sums: [row][32], the first group's
// first; they start at 0 or go on. Where kByRow, those of kGroup rows may be written of one of several groups.
// Fetch::line: the first two groups fetch half of `next` each.
template <class M, Fetch kFetch>
ISO_INLINE void multiply_groups(const uint32_t* w, const Group* groups, int64_t count, int64_t begin, int64_t n,
                                float* sums, bool go_on, const uint32_t* next = nullptr) {
#if ISO_AMX
  if constexpr (kByRow<M>) {
    const auto rows_of = [&](int64_t g) ISO_ATTR { return tile_rows<M>(groups, g, begin, sums); };
    int64_t g = 0;
    for (; g + 2 <= count; g += 2) multiply_steps<kFetch>(w, {rows_of(g), rows_of(g + 1)}, n, go_on, next);
    if (g < count) multiply_steps<kFetch>(w, {rows_of(g)}, n, go_on, next);
    return;
  }
#endif
  for (int64_t g = 0; g < count; ++g) {
    const Group& group = groups[g];
    multiply<M, kFetch>(w, kTile, words_from<M>(group, begin), group.stride, group.rows, n, kTile,
                        sums + (group.first - groups[0].first) * kTile, kTile, go_on ? Into::add : Into::zero,
                        kFetch == Fetch::line ? next + least(g, 1) * n * 16 : next);
  }
}

// The same words, the sums of `scale_words` of them apart; each, × its scale, is added to the row's. scales
// [n / scale_words][32].
template <class M>
ISO_INLINE void multiply_scaled(const uint32_t* w, const Group* groups, int64_t count, int64_t begin, int64_t n,
                                int64_t scale_words, float* sums, const float* scales) {
  for (int64_t g = 0; g < count; ++g) {
#if ISO_AMX
    if constexpr (kByRow<M>) {
      multiply_scaled_steps(w, tile_rows<M>(groups, g, begin, sums), n, scale_words, scales);
      continue;
    }
#endif
    const Group& group = groups[g];
    const uint32_t* words = words_from<M>(group, begin);
    float* to = sums + (group.first - groups[0].first) * kTile;
    if (W == 16 && scale_words < kScaleWords) {
      row_blocks(
          group.rows,
          [&](int r, auto block_rows) ISO_ATTR {
            constexpr int R = decltype(block_rows)::value;
            if constexpr (R <= kRowBlock / 2)
              held_block<M, R>(w, words + r, group.stride, n, scale_words, to + r * kTile, scales);
          },
          kRowBlock / 2);
      continue;
    }
    const auto* following = g + 1 < count ? words_from<M>(groups[g + 1], begin) : words_from<M>(groups[0], begin + n);
    row_blocks(group.rows, [&](int r, auto block_rows) ISO_ATTR {
      constexpr int R = decltype(block_rows)::value;
      for (int o = 0; o < kTile; o += kVectors<R> * W) {
        scaled_block<M, R>(w + o, words + r, group.stride, n, scale_words, to + r * kTile + o, scales + o, following);
      }
    });
  }
}

// `n` words of a group's rows against those of a tile, to sums whose rows are `sum_stride` apart. Where kByRow, those
// of all rows for which there are registers are written.
template <class M>
ISO_INLINE void multiply_group(const uint32_t* w, const Group& group, int64_t n, float* sums, int64_t sum_stride) {
#if ISO_AMX
  if constexpr (kByRow<M>) {
    multiply_steps<Fetch::none>(w, {TileRows{group.words, group.stride, group.rows, sums, sum_stride}}, n, false,
                                nullptr);
    return;
  }
#endif
  multiply<M, Fetch::none>(w, kTile, group.words, group.stride, group.rows, n, kTile, sums, sum_stride, Into::zero);
}

// What a decoded tile and packed rows are made of: floats where rows are (kRowWords).
template <class M>
using Decoded = std::conditional_t<kRowWords<M> == 2, F32, M>;
constexpr int64_t kDecodedWords = kBlockWords * kRowWords<Bf16>;  // of kBlockWords

// Word u of a decoded tile.
ISO_INLINE void keep_word(uint32_t* decoded, int64_t u, const vi* weight) {
  uint32_t* to = decoded + u * kRowWords<Bf16> * kTile;
#pragma GCC unroll 8
  for (int v = 0; v < kTileVectors; ++v) {
    vi word = weight[v];
    if (kRowWords<Bf16> == 2) {
      *reinterpret_cast<vi_memory*>(to + kTile + v * W) = (vi_memory)(word & set_word(0xffff0000u));
      word = word << 16;
    }
    *reinterpret_cast<vi_memory*>(to + v * W) = (vi_memory)word;
  }
}

// Whether each group had better decode a tile for itself, in registers.
template <class M>
ISO_INLINE bool direct(const Group* groups, int64_t count) {
#define ISO_CASE(R) +1
  constexpr int kRows = 0 ISO_DIRECT_ROWS(ISO_CASE);
#undef ISO_CASE
  return count <= kDirectGroups && groups[0].rows <= kRows;
}
