// bfloat16 weights in three quarters of their bytes, without loss.
//
// Nearly all weights of a tile share 16 exponents. Each weight keeps its sign and mantissa in a byte, and gets a 4-bit
// code for its exponent; the few with another exponent are listed, and put back while the tile is decoded.
#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "tile_kind.h"

namespace iso {
namespace {

struct Codes {
  std::array<uint8_t, 256> of;  // exponent → code; kCodes: has none
  std::array<uint8_t, kCodes> exponent;
  int64_t exceptions = 0;

  explicit Codes(const uint16_t* values, int64_t count) {
    std::array<std::array<uint32_t, 256>, 2> counts{};  // two, for equal exponents follow each other
    for (int64_t i = 0; i < count; i += 2) {
      ++counts[0][values[i] >> 7 & 0xff];
      ++counts[1][values[i + 1] >> 7 & 0xff];
    }
    std::array<int, 256> order;
    std::iota(order.begin(), order.end(), 0);
    const auto seen = [&](int e) { return counts[0][static_cast<size_t>(e)] + counts[1][static_cast<size_t>(e)]; };
    std::partial_sort(order.begin(), order.begin() + kCodes, order.end(),
                      [&](int a, int b) { return seen(a) != seen(b) ? seen(a) > seen(b) : a < b; });
    of.fill(kCodes);
    exceptions = count;
    for (int c = 0; c < kCodes; ++c) {
      of[static_cast<size_t>(order[static_cast<size_t>(c)])] = static_cast<uint8_t>(c);
      exponent[static_cast<size_t>(c)] = static_cast<uint8_t>(order[static_cast<size_t>(c)]);
      exceptions -= seen(order[static_cast<size_t>(c)]);
    }
  }
};

// One tile of `words` words: pairs of words as 2 × 64 bytes of sign and mantissa and 64 bytes of codes, the first
// word's in the low halves.
void encode(const uint16_t* values, int64_t words, const Codes& codes, uint8_t* out, uint8_t* tables,
            CodedException* exceptions) {
  for (size_t c = 0; c < kCodes; ++c) {
    tables[c] = static_cast<uint8_t>(codes.exponent[c] << 7);
    tables[kCodes + c] = static_cast<uint8_t>(codes.exponent[c] >> 1);
  }
  uint8_t code[64];
  for (int64_t u = 0; u < words; ++u) {
    const uint16_t* from = values + u * 64;
    uint8_t* pair = out + u / 2 * kCodedPair;
    uint8_t* bytes = pair + u % 2 * 64;
    bool all = true;
    for (int o = 0; o < kTile; ++o) {
      for (int half = 0; half < 2; ++half) {
        const uint16_t value = from[2 * o + half];
        const int place = byte_place(o) * 2 + half;
        bytes[place] = static_cast<uint8_t>((value >> 8 & 0x80) | (value & 0x7f));
        code[place] = codes.of[value >> 7 & 0xff];
        all = all && code[place] < kCodes;
      }
    }
    if (!all) {
      for (int i = 0; i < 64; ++i) {
        if (codes.of[from[i] >> 7 & 0xff] == kCodes)
          *exceptions++ = CodedException{static_cast<uint32_t>(u * 64 + i), from[i]};
      }
    }
    uint8_t* nibbles = pair + 128;
    for (int i = 0; i < 64; ++i) {
      const auto low = static_cast<uint8_t>(code[i] & 15);
      nibbles[i] = u % 2 == 0 ? low : static_cast<uint8_t>(nibbles[i] | low << 4);
    }
  }
  if (words % 2 != 0) std::memset(out + words / 2 * kCodedPair + 64, 0, 64);
  *exceptions = CodedException{kNoException, 0};
}

// How many bytes precede the exceptions.
size_t bytes_before(const Linear& linear) {
  const auto tiles = static_cast<size_t>(linear.tiles);
  return tiles * (linear.tile_bytes + 2 * kCodes) + (tiles + 1) * sizeof(int64_t);
}

void point_into_data(Linear& coded) {
  const auto tiles = static_cast<size_t>(coded.tiles);
  coded.code_tables = coded.data + tiles * coded.tile_bytes;
  coded.exception_begin = reinterpret_cast<int64_t*>(coded.code_tables + tiles * 2 * kCodes);
  coded.exceptions = reinterpret_cast<CodedException*>(coded.data + bytes_before(coded));
}

bool adopt(Linear& coded) {
  if (coded.data_bytes < bytes_before(coded)) return false;
  point_into_data(coded);
  const auto room = static_cast<int64_t>((coded.data_bytes - bytes_before(coded)) / sizeof(CodedException));
  const int64_t* begin = coded.exception_begin;
  if (begin[0] != 0 || begin[coded.tiles] != room) return false;
  for (int64_t t = 0; t < coded.tiles; ++t) {
    if (begin[t + 1] <= begin[t] || begin[t + 1] > room) return false;
    const CodedException *first = coded.exceptions + begin[t], *last = coded.exceptions + begin[t + 1] - 1;
    if (last->place != kNoException) return false;
    for (; first < last; ++first)
      if (first->place >= coded.words * 64) return false;
  }
  return true;
}

}  // namespace

void code(Pool& pool, const Ops& ops, Linear& linear) {
  if (!ops.reads_coded || linear.tiles == 0) return;
  const int64_t count = linear.words * 64;
  const auto values = [&](int64_t t) { return reinterpret_cast<const uint16_t*>(linear.tile(t)); };
  std::vector<Codes> codes(static_cast<size_t>(linear.tiles), Codes(nullptr, 0));
  auto look = [&](int64_t t) { codes[static_cast<size_t>(t)] = Codes(values(t), count); };
  parallel(pool, linear.tiles, look);
  std::vector<int64_t> begin{0};
  for (const Codes& c : codes) begin.push_back(begin.back() + c.exceptions + 1);
  Linear coded = linear;
  coded.kind = Kind::coded;
  coded.tile_bytes = tile_kind(Kind::coded).tile_bytes(linear);
  coded.data_bytes = bytes_before(coded) + static_cast<size_t>(begin.back()) * sizeof(CodedException);
  if (coded.data_bytes * 8 > linear.data_bytes * 7) return;  // too many exceptions to be worth it
  coded.data = static_cast<uint8_t*>(allocate(coded.data_bytes));
  point_into_data(coded);
  std::copy(begin.begin(), begin.end(), coded.exception_begin);
  auto write = [&](int64_t t) {
    encode(values(t), linear.words, codes[static_cast<size_t>(t)], const_cast<uint8_t*>(coded.tile(t)),
           coded.code_tables + t * 2 * kCodes, coded.exceptions + begin[static_cast<size_t>(t)]);
  };
  parallel(pool, linear.tiles, write);
  release(linear.data, linear.data_bytes);
  linear = coded;
}

const TileKind coded_tiles = {
    [](int64_t inputs) { return (inputs + 1) / 2; },
    [](const Linear& linear) { return static_cast<size_t>((linear.words + 1) / 2 * kCodedPair); },
    [](int64_t) { return int64_t{0}; },
    nullptr,
    nullptr,
    adopt,
};

}  // namespace iso
