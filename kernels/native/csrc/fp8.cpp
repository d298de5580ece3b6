// FP8 tiles: e4m3 codes as they are stored, and one scale for each 128 inputs of a tile.
#include <cstring>

#include "tile_kind.h"

namespace iso {
namespace {

// Operands: codes, scales [⌈N / 128⌉, ⌈K / 128⌉]. [word][64] bytes in the order of byte_place.
void pack(Linear& linear, int64_t tile, int64_t first, const Operand* operands) {
  const Operand &codes = operands[0], &scales = operands[1];
  const int64_t words = linear.words, pairs = linear.inputs / 2;
  const int width = linear.tile_width[tile];
  const auto row = [&](int o) { return static_cast<const uint8_t*>(codes.data) + (first + o) * codes.row_stride; };
  auto* target = reinterpret_cast<uint16_t*>(linear.data + static_cast<size_t>(tile) * linear.tile_bytes);
  if (width < kTile || linear.inputs % 2 != 0) std::memset(target, 0, linear.tile_bytes);
  for (int64_t begin = 0; begin < pairs; begin += 32) {
    const int count = static_cast<int>(pairs - begin < 32 ? pairs - begin : 32);
    for (int o = 0; o < width; ++o) {
      const uint8_t* from = row(o) + begin * 2;
      uint16_t* to = target + begin * kTile + byte_place(o);
      for (int i = 0; i < count; ++i) std::memcpy(to + i * kTile, from + 2 * i, 2);
    }
  }
  if (linear.inputs % 2 != 0) {
    for (int o = 0; o < width; ++o) target[(words - 1) * kTile + byte_place(o)] = row(o)[linear.inputs - 1];
  }
  const float* scale = static_cast<const float*>(scales.data) + first / kScaleBlock * scales.row_stride;
  std::memcpy(linear.scales + tile * linear.scale_blocks, scale, static_cast<size_t>(linear.scale_blocks) * 4);
}

}  // namespace

const TileKind fp8_tiles = {
    [](int64_t inputs) { return (inputs + 1) / 2; },
    [](const Linear& linear) { return static_cast<size_t>(linear.words * 64); },
    [](int64_t inputs) { return (inputs + kScaleBlock - 1) / kScaleBlock; },
    pack,
    nullptr,
};

}  // namespace iso
