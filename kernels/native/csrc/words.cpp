// bf16 and f32 tiles: the numbers of a plain weight, without arithmetic but for dtype conversion.
#include <cstring>

#include "tile_kind.h"

namespace iso {
namespace {

uint16_t bf16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float f32_of_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

float f32_of_f16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16, magnitude = value & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    const float exact = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // subnormal: a multiple of 2^-24
    std::memcpy(&bits, &exact, 4);
  }
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

float element(const void* row, Dtype dtype, int64_t k) {
  if (dtype == Dtype::f32) return static_cast<const float*>(row)[k];
  const uint16_t value = static_cast<const uint16_t*>(row)[k];
  return dtype == Dtype::f16 ? f32_of_f16(value) : f32_of_bf16(value);
}

// One row as words, in the packed kind. `words` has room for all of them.
void row_words(const void* row, Dtype dtype, Kind kind, int64_t inputs, int64_t words, uint32_t* out) {
  if (kind == Kind::f32) {
    for (int64_t k = 0; k < inputs; ++k) {
      const float value = element(row, dtype, k);
      std::memcpy(out + k, &value, 4);
    }
    return;
  }
  auto* halves = reinterpret_cast<uint16_t*>(out);
  halves[2 * words - 1] = 0;  // an odd K is padded with zero
  if (dtype == Dtype::bf16) {
    std::memcpy(halves, row, static_cast<size_t>(inputs) * 2);
  } else {
    for (int64_t k = 0; k < inputs; ++k) halves[k] = bf16_of(element(row, dtype, k));
  }
}

// [word][32] words
void pack(Linear& linear, int64_t tile, int64_t first, const Operand* operands) {
  // Blocks of 16 words (a cache line) of all 32 rows are read, then written as 16 lines of 32 outputs.
  const Operand& source = operands[0];
  const int64_t words = linear.words, row_bytes = source.row_stride * (source.dtype == Dtype::f32 ? 4 : 2);
  const int width = linear.tile_width[tile];
  auto* target = reinterpret_cast<uint32_t*>(linear.data + static_cast<size_t>(tile) * linear.tile_bytes);
  auto* rows = scratch_of<uint32_t>(kShared, static_cast<size_t>(words) * kTile);
  for (int o = 0; o < width; ++o) {
    row_words(static_cast<const uint8_t*>(source.data) + (first + o) * row_bytes, source.dtype, linear.kind,
              linear.inputs, words, rows + o * words);
  }
  for (int o = width; o < kTile; ++o) std::memset(rows + o * words, 0, static_cast<size_t>(words) * 4);
  for (int64_t begin = 0; begin < words; begin += 16) {
    const int count = static_cast<int>(words - begin < 16 ? words - begin : 16);
    for (int o = 0; o < kTile; ++o) {
      const uint32_t* from = rows + o * words + begin;
      uint32_t* to = target + begin * kTile + o;
      for (int i = 0; i < count; ++i) to[i * kTile] = from[i];
    }
  }
}

size_t bytes(const Linear& linear) { return static_cast<size_t>(linear.words * kTile * 4); }
int64_t no_scales(int64_t) { return 0; }

}  // namespace

const TileKind bf16_tiles = {[](int64_t inputs) { return (inputs + 1) / 2; }, bytes, no_scales, pack, code};
const TileKind f32_tiles = {[](int64_t inputs) { return inputs; }, bytes, no_scales, pack, nullptr};

}  // namespace iso
