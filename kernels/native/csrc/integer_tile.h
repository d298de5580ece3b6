// Integers with a scale for each group of inputs (grouped.cpp), multiplied as integers.
//
// The inputs of a row that share scales are taken as one power of two × whole numbers of 30 bits, each in two halves:
// what that leaves off is 2^-31 of the largest of them. Products and their sums are exact, so it is for each group of
// inputs alone that a row's sum is rounded.

constexpr int kHalfBits = 15;

template <bool kOne>
ISO_INLINE vi largest_bits(const uint32_t* words, int64_t n, int rows, int row) {
  const int lanes = rows - row;
  vi largest = set_word(0);
  const auto add = [&](const uint32_t* p, int64_t valid) ISO_ATTR {
    largest = (vi)_mm256_max_epi32((__m256i)largest, (__m256i)(load_lanes(p, valid) & 0x7fffffff));
  };
  if (kOne) {
    for (int64_t u = 0; u < 2 * n; u += W) add(words + u, 2 * n - u);
  } else {
    for (int64_t u = 0; u < 2 * n; ++u) add(words + u * rows + row, lanes);
  }
  return largest >> 16;
}

// Words of `rows` rows whose inputs share scales → both halves, and what the sums need: for lanes of rows from `row`
// on, or with kOne of one row, for lanes of words.
template <bool kOne>
ISO_INLINE void to_integers(const uint32_t* words, int64_t n, int rows, int row, uint32_t* high, uint32_t* low,
                            RowScale* scales) {
  vi exponent = largest_bits<kOne>(words, n, rows, row);
  if (kOne) {
    int most_of_all = 0;
    for (int i = 0; i < W; ++i) most_of_all = exponent[i] > most_of_all ? exponent[i] : most_of_all;
    exponent = set_word(static_cast<uint32_t>(most_of_all));
  }
  exponent = exponent >> 7;
  exponent = exponent > 30 ? exponent : set_word(30);
  const vf factor = (vf)((283 - exponent) << 23);  // the largest lies just below 2^30
  const vf scale = exponent == 255 ? set(__builtin_nanf("")) : (vf)((exponent - 29) << 23);
  vi high_sum = set_word(0), low_sum = high_sum;
  const auto split = [&](int64_t at, int64_t valid) ISO_ATTR {
    vi both[2], part[2], rest[2];
    if (kOne) {
      const vi one = load_lanes(words + 2 * at, 2 * valid), two = load_lanes(words + 2 * at + W, 2 * valid - W);
      const vi order = {0, 2, 4, 6, 1, 3, 5, 7};
      const __m256i a = _mm256_permutevar8x32_epi32((__m256i)one, (__m256i)order),
                    b = _mm256_permutevar8x32_epi32((__m256i)two, (__m256i)order);
      both[0] = (vi)_mm256_permute2x128_si256(a, b, 0x20), both[1] = (vi)_mm256_permute2x128_si256(a, b, 0x31);
    } else {
      const uint32_t* from = words + 2 * (at - row) + row;
      both[0] = load_lanes(from, valid), both[1] = load_lanes(from + rows, valid);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const vf value = (vf)both[i] * factor;
      const vi whole = (vi)_mm256_cvtps_epi32((__m256)value);
      part[i] = (whole + (1 << (kHalfBits - 1))) >> kHalfBits;
      rest[i] = whole - (part[i] << kHalfBits);
      high_sum += part[i], low_sum += rest[i];
    }
    const int n_stored = static_cast<int>(least(valid, W));
    store_lanes(high + at, (part[0] & 0xffff) | part[1] << 16, n_stored);
    store_lanes(low + at, (rest[0] & 0xffff) | rest[1] << 16, n_stored);
  };
  if (kOne) {
    for (int64_t u = 0; u < n; u += W) split(u, n - u);
    int32_t sums[2] = {};
    for (int i = 0; i < W; ++i) sums[0] += high_sum[i], sums[1] += low_sum[i];
    *scales = RowScale{scale[0], sums[0], sums[1]};
  } else {
    for (int64_t u = 0; u < n; ++u) split(u * rows + row, rows - row);
    for (int i = 0; i < W && row + i < rows; ++i) scales[row + i] = RowScale{scale[i], high_sum[i], low_sum[i]};
  }
}

// The groups as products with this weight take them. What is made for it is the calling thread's until it asks again.
template <class M>
ISO_INLINE const Group* groups_for(const Linear& weight, const Group* groups, int64_t count) {
  if (M::f32 || (weight.kind != Kind::int4 && weight.kind != Kind::int8)) return groups;
  const int64_t group_words = weight.grouping.inputs / 2, parts = ceil_div(weight.words, group_words);
  int64_t rows = 0;
  for (int64_t g = 0; g < count; ++g) rows += groups[g].rows;
  auto* out = scratch_of<Group>(kWholeGroups, count);
  auto* words = scratch_of<uint32_t>(kWholes, 2 * rows * weight.words);
  auto* scales = scratch_of<RowScale>(kWholeScales, rows * parts);
  for (int64_t g = 0; g < count; ++g) {
    const Group& from = groups[g];
    const int n = from.rows;
    uint32_t *high = words, *low = words + n * weight.words;
    out[g] = Group{high, n, n, from.first, low, scales};
    for (int64_t begin = 0; begin < weight.words; begin += group_words, scales += n) {
      const int64_t at = begin * n, here = least(group_words, weight.words - begin);
      if (n == 1) {
        to_integers<true>(from.words + 2 * at, here, 1, 0, high + at, low + at, scales);
      } else {
        for (int row = 0; row < n; row += W)
          to_integers<false>(from.words + 2 * at, here, n, row, high + at, low + at, scales);
      }
    }
    words += 2 * n * weight.words;
  }
  return out;
}

ISO_INLINE vi add_products(vi sum, vi weight, vi x) { return sum + (vi)_mm256_madd_epi16((__m256i)weight, (__m256i)x); }
ISO_INLINE vf to_floats(vi v) { return (vf)_mm256_cvtepi32_ps((__m256i)v); }

// Adds both halves' sums × scale to a row's.
ISO_INLINE void add_integers(float* to, vf high, vi low, vf scale) {
  store(to, fma(fma(high, set(1 << kHalfBits), to_floats(low)), scale, load(to)));
}

ISO_INLINE vf scale_vector(const Linear& weight, const uint8_t* block, int v) {
  const uint8_t* scales = block + weight.code_bytes;
  return weight.grouping.scale_bytes == 4 ? load(reinterpret_cast<const float*>(scales) + v * W)
                                          : load_bf16_vector(reinterpret_cast<const uint16_t*>(scales) + v * W);
}

// Zero points of vector v, where there are some.
template <class D>
ISO_INLINE vi points_of(const Linear& weight, const uint8_t* block, int v) {
  return D::points(block + weight.code_bytes + kTile * weight.grouping.scale_bytes, v);
}

// R rows against a tile that is decoded in registers, half of it at a time.
template <class D, int R>
static void integer_direct(const Linear& weight, const uint8_t* block, const Group& group, float* sums,
                           const uint8_t* next) {
  const int64_t group_words = weight.grouping.inputs / 2;
  const uint8_t* end_of_tile = block + weight.tile_bytes;
  const RowScale* scales = group.scales;
  for (int i = 0; i < R * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0; begin < weight.words; begin += group_words, block += weight.block_bytes, scales += R) {
    const int64_t n = least(group_words, weight.words - begin);
    const uint8_t* ahead = block + kPrefetchWords * 4;
    if (ahead >= end_of_tile) ahead = next + (ahead - end_of_tile);
    for (int64_t i = 0; i < weight.block_bytes; i += 64) prefetch(ahead + i);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vi high[R][2], low[R][2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const vi points = points_of<D>(weight, block, half + 2 * v);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) high[r][v] = -points * scales[r].high, low[r][v] = -points * scales[r].low;
      }
      const uint8_t* codes = block + half * 32;
      const uint32_t *a = group.words + begin * R, *b = group.low + begin * R;
      const auto word = [&](int i) ISO_ATTR {
        vi w[2];
        D::decode(codes, i, w);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const vi x = set_word(load_word(a + r)), y = set_word(load_word(b + r));
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            high[r][v] = add_products(high[r][v], w[v], x);
            low[r][v] = add_products(low[r][v], w[v], y);
          }
        }
        a += R, b += R;
      };
      int64_t u = 0;
      for (; u + D::kWords <= n; u += D::kWords, codes += 64) {
#pragma GCC unroll 2
        for (int i = 0; i < D::kWords; ++i) word(i);
      }
      if (u < n) word(0);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const vf scale = scale_vector(weight, block, half + 2 * v);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          float* to = sums + r * kTile + (half + 2 * v) * W;
          add_integers(to, to_floats(high[r][v]), low[r][v], scale * set(scales[r].scale));
        }
      }
    }
  }
}

// R rows × one half against two vectors of a decoded tile.
template <int R>
ISO_INLINE void integer_words(const uint32_t* w, const uint32_t* a, int64_t a_stride, int64_t n, vi (&sums)[R][2]) {
  for (int64_t u = 0; u < n; ++u, w += kTile, a += a_stride) {
    const vi weight[] = {load_words(w), load_words(w + W)};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vi x = set_word(load_word(a + r));
      sums[r][0] = add_products(sums[r][0], weight[0], x);
      sums[r][1] = add_products(sums[r][1], weight[1], x);
    }
  }
}

// R rows from `row` on against words [begin, begin + n) of a tile, which share the scales and zero points given.
template <int R>
static void integer_block(const uint32_t* w, const Group& group, int row, int64_t begin, int64_t n,
                          const RowScale* row_scales, const int32_t* points, const float* scales, float* sums) {
  const int64_t at = begin * group.stride + row;
  for (int o = 0; o < kTile; o += 2 * W) {
    vi part[R][2];
    vf high[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) part[r][v] = -load_words(points + o + v * W) * row_scales[row + r].high;
    }
    integer_words<R>(w + o, group.words + at, group.stride, n, part);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        high[r][v] = to_floats(part[r][v]);
        part[r][v] = -load_words(points + o + v * W) * row_scales[row + r].low;
      }
    }
    integer_words<R>(w + o, group.low + at, group.stride, n, part);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        add_integers(sums + (row + r) * kTile + o + v * W, high[r][v], part[r][v],
                     load(scales + o + v * W) * set(row_scales[row + r].scale));
      }
    }
  }
}

static void integer_rows(const uint32_t* w, const Group& group, int64_t begin, int64_t n, const RowScale* row_scales,
                         const int32_t* points, const float* scales, float* sums) {
  const int step = static_cast<int>(ceil_div(group.rows, ceil_div(group.rows, kRowBlock)));
  for (int r = 0; r < group.rows; r += step) {
    switch (group.rows - r < step ? group.rows - r : step) {
#define ISO_CASE(R)                                                            \
  case R:                                                                      \
    integer_block<R>(w, group, r, begin, n, row_scales, points, scales, sums); \
    break;
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
}

// Decoded once for all rows, the words that share scales at a time.
template <class D>
static void integer_blocks(const Linear& weight, const uint8_t* block, const Group* groups, int64_t count, float* sums,
                           const uint8_t* next) {
  const int64_t group_words = weight.grouping.inputs / 2, base = groups[0].first;
  const uint8_t* end_of_tile = block + weight.tile_bytes;
  alignas(64) uint32_t decoded[kBlockWords * kTile];
  alignas(64) float scales[kTile];
  alignas(64) int32_t points[kTile];
  const int64_t rows = groups[count - 1].first + groups[count - 1].rows - base;
  for (int64_t i = 0; i < rows * kTile; i += W) store(sums + i, set(0.0f));
  for (int64_t begin = 0, part = 0; begin < weight.words; begin += group_words, block += weight.block_bytes, ++part) {
    const int64_t n = least(group_words, weight.words - begin);
    for (int64_t u = 0; u < n; u += D::kWords) {
      const uint8_t *codes = block + u / D::kWords * 64, *ahead = codes + kPrefetchWords * 4;
      prefetch(ahead < end_of_tile ? ahead : next + (ahead - end_of_tile));
#pragma GCC unroll 2
      for (int i = 0; i < D::kWords; ++i) {  // a word that is one too many has its place
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          vi w[2];
          D::decode(codes + half * 32, i, w);
          uint32_t* to = decoded + (u + i) * kTile + half * W;
          *reinterpret_cast<vi_memory*>(to) = (vi_memory)w[0];
          *reinterpret_cast<vi_memory*>(to + 2 * W) = (vi_memory)w[1];
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      store(scales + v * W, scale_vector(weight, block, v));
      *reinterpret_cast<vi_memory*>(points + v * W) = (vi_memory)points_of<D>(weight, block, v);
    }
    for (int64_t g = 0; g < count; ++g)
      integer_rows(decoded, groups[g], begin, n, groups[g].scales + part * groups[g].rows, points, scales,
                   sums + (groups[g].first - base) * kTile);
  }
}

template <class D>
static void integer_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                             const uint8_t* next) {
  const uint8_t* tile = weight.tile(t);
  switch (count == 1 ? groups[0].rows : 0) {
    case 1:
      return integer_direct<D, 1>(weight, tile, groups[0], sums, next);
    case 2:
      return integer_direct<D, 2>(weight, tile, groups[0], sums, next);
    case 3:
      return integer_direct<D, 3>(weight, tile, groups[0], sums, next);
    default:
      return integer_blocks<D>(weight, tile, groups, count, sums, next);
  }
}

template <class M>
static void int4_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  if (weight.grouping.zeros != 0) {
    integer_multiply<Int4Decoder<true>>(weight, t, groups, count, sums, next);
  } else {
    integer_multiply<Int4Decoder<false>>(weight, t, groups, count, sums, next);
  }
}

template <class M>
static void int8_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                          const uint8_t* next) {
  integer_multiply<Int8Decoder>(weight, t, groups, count, sums, next);
}
