// bfloat16 weights with coded exponents (coded.cpp): to the same bits as the plain ones.

#if ISO_W >= 8
constexpr int kWordValues = 2 * kTile;  // 16-bit values in a word of a tile

// Puts back what the codes of a word can't say; → the next exception.
static __attribute__((noinline)) const CodedException* put_back(const CodedException* exception, int64_t word,
                                                                vi* weight) {
  alignas(64) uint16_t halves[kWordValues];
  __builtin_memcpy(halves, weight, sizeof(halves));
  for (; exception->place / kWordValues == word; ++exception)
    halves[exception->place % kWordValues] = static_cast<uint16_t>(exception->value);
  __builtin_memcpy(weight, halves, sizeof(halves));
  return exception;
}

// `words` words of a coded tile from word `begin`, an even one, on: against R rows, decoded in registers, or with R = 0
// left in `decoded`. → The next exception.
template <int R>
ISO_INLINE const CodedException* coded_block(const CodedDecoder& decoder, const uint8_t* tile, int64_t begin,
                                             int64_t words, int64_t tile_words, const CodedException* exception,
                                             const uint32_t* a, int64_t a_stride, float* sums, Into into,
                                             uint32_t* decoded, const uint8_t* next) {
  RowSums<(R > 0 ? R : 1)> own;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      if (into == Into::add) own.sums[r][v] = load(sums + r * kTile + v * W);
    }
  }
  const int64_t end = ceil_div(begin + words, 2), turn = ceil_div(tile_words, 2) - kPrefetchWords * 4 / kCodedPair;
  const uint8_t* pair = tile + begin / 2 * kCodedPair;
  const uint8_t* ahead = begin / 2 < turn ? pair + kPrefetchWords * 4 : next + (begin / 2 - most(0, turn)) * kCodedPair;
  for (int64_t p = begin / 2; p < end; ++p, pair += kCodedPair) {
    prefetch(ahead), prefetch(ahead + 64), prefetch(ahead + 128);
    ahead = p + 1 == turn ? next : ahead + kCodedPair;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && p * 2 + 1 == tile_words) break;
      vi weight[kTileVectors];
      decoder.decode(pair, i, weight);
      if (__builtin_expect(exception->place / kWordValues == p * 2 + i, 0))
        exception = put_back(exception, p * 2 + i, weight);
      if constexpr (R == 0) {
        keep_word(decoded, p * 2 + i - begin, weight);
      } else {
        own.add(weight, a);
        a += kRowWords<Bf16> * a_stride;
      }
    }
  }
  own.finish();
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) store(sums + r * kTile + v * W, own.sums[r][v]);
  }
  return exception;
}

static const CodedException* coded_group(const CodedDecoder& decoder, const uint8_t* tile, int64_t begin, int64_t words,
                                         int64_t tile_words, const CodedException* exception, const Group& g,
                                         float* sums, Into into, const uint8_t* next) {
  const int64_t stride = word_stride(g);
  const uint32_t* a = g.words + begin * kRowWords<Bf16> * stride;
  switch (g.rows) {
#define ISO_CASE(R) \
  case R:           \
    return coded_block<R>(decoder, tile, begin, words, tile_words, exception, a, stride, sums, into, nullptr, next);
    ISO_DIRECT_ROWS(ISO_CASE)
#undef ISO_CASE
    default:
      return exception;
  }
}

template <class M>
static void coded_multiply(const Linear& weight, int64_t t, const Group* groups, int64_t count, float* sums,
                           const uint8_t* next) {
  const int64_t words = weight.words;
  const uint8_t* tile = weight.tile(t);
  const CodedDecoder decoder = CodedDecoder::make(weight.code_tables + t * 2 * kCodes);
  const CodedException* exception = weight.exceptions + weight.exception_begin[t];
  const bool decode_each = direct<M>(groups, count);
  if (decode_each && count == 1) {
    coded_group(decoder, tile, 0, words, words, exception, groups[0], sums, Into::zero, next);
    return;
  }
  alignas(64) uint32_t decoded[kDecodedWords * kTile];
  for (int64_t begin = 0; begin < words; begin += kBlockWords) {
    const int64_t n = least(kBlockWords, words - begin);
    const Into into = begin == 0 ? Into::zero : Into::add;
    const CodedException* after = exception;
    if (decode_each) {
      for (int64_t g = 0; g < count; ++g) {
        float* to = sums + (groups[g].first - groups[0].first) * kTile;
        after = coded_group(decoder, tile, begin, n, words, exception, groups[g], to, into, next);
      }
    } else {
      after = coded_block<0>(decoder, tile, begin, n, words, exception, nullptr, 0, sums, into, decoded, next);
      multiply_groups<Decoded<M>, Fetch::none>(decoded, groups, count, kRowWords<M> * begin, kRowWords<M> * n, sums,
                                               begin > 0);
    }
    exception = after;
  }
}
#else
template <class M>
static void coded_multiply(const Linear&, int64_t, const Group*, int64_t, float*, const uint8_t*) {}
#endif
