// int4, int6 and int8 tiles: integers, and one scale for each group of inputs of an output.
//
// A tile is one block for each group: the codes, 32 scales, and where there are zero points 64 bytes of them. Two words
// of int4 share 64 bytes: 32 lanes of 16 bits, a lane's nibbles from the lowest on an element of outputs 0 .. 15 and
// the same of 16 .. 31, of the first word and then of the second (int4_place). Of zero points a lane has one of outputs
// 0 .. 15 in its low byte and one of 16 .. 31 in the other. int8 lies in the order of byte_place, with its sign in the
// top bit and a magnitude beside it. Four words of int6 share three times 64 bytes, each in that order: a byte's lower
// six bits are a code, number + 32, of the first three words, and the upper two of all three bytes one of the fourth,
// from its lowest bits on. The last block is as large as the others.
#include <cstring>

#include "tile_kind.h"

namespace iso {
namespace {

const void* row_of(const Operand& operand, int64_t row, int64_t element) {
  return static_cast<const uint8_t*>(operand.data) + row * operand.row_stride * element;
}

// Codes, and scales after them, of group `group` of a tile.
uint8_t* block_of(const Linear& linear, int64_t tile, int64_t group) {
  return const_cast<uint8_t*>(linear.tile(tile)) + group * linear.block_bytes;
}

int64_t groups_of(const Linear& linear) {
  return (linear.inputs + linear.grouping.inputs - 1) / linear.grouping.inputs;
}

void pack_scale(const Linear& linear, uint8_t* block, int output, float scale) {
  uint8_t* scales = block + linear.code_bytes;
  if (linear.grouping.scale_bytes == 1) {
    uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    scales[output] = narrow_scale(bits, linear.grouping.exponent);
  } else if (linear.grouping.scale_bytes == 4) {
    std::memcpy(scales + output * 4, &scale, 4);
  } else {
    std::memcpy(scales + output * 2, reinterpret_cast<const uint8_t*>(&scale) + 2, 2);  // all that is not zero of it
  }
}

// Operands: nibbles [N, ⌈K / 2⌉], scales [N, groups], and zero points [N, groups].
void pack_int4(Linear& linear, int64_t tile, int64_t first, const Operand* operands) {
  std::memset(block_of(linear, tile, 0), 0, linear.tile_bytes);
  const int64_t group_words = linear.grouping.inputs / 2, groups = groups_of(linear);
  for (int o = 0; o < linear.tile_width[tile]; ++o) {
    const auto* codes = static_cast<const uint8_t*>(row_of(operands[0], first + o, 1));
    const auto* scales = static_cast<const float*>(row_of(operands[1], first + o, 4));
    const int place = int4_place(o), upper = o / 16, shift = 4 * upper;
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* block = block_of(linear, tile, g);
      const int64_t begin = g * group_words,
                    end = linear.words < begin + group_words ? linear.words : begin + group_words;
      uint8_t* to = block + place;
      for (int64_t u = begin; u < end; u += 2, to += 64) {
        const int one = codes[u], two = u + 1 < end ? codes[u + 1] : 0;
        uint32_t lanes;
        std::memcpy(&lanes, to, sizeof(lanes));
        lanes |= static_cast<uint32_t>((one & 15) | (two & 15) << 8 | one >> 4 << 16 | two >> 4 << 24) << shift;
        std::memcpy(to, &lanes, sizeof(lanes));
      }
      pack_scale(linear, block, o, scales[g]);
      if (linear.grouping.zeros != 0) {
        const auto* zeros = static_cast<const uint8_t*>(row_of(operands[2], first + o, 1));
        uint8_t* const zero = block + linear.code_bytes + kTile * linear.grouping.scale_bytes + place + upper;
        zero[0] = zero[2] = zeros[g];
      }
    }
  }
}

// Operands: codes [N, K], a byte each, and scales [N, groups]. put(block, output, input of the block, code).
template <class Put>
void pack_bytes(Linear& linear, int64_t tile, int64_t first, const Operand* operands, const Put& put) {
  std::memset(block_of(linear, tile, 0), 0, linear.tile_bytes);
  const int64_t groups = groups_of(linear);
  for (int o = 0; o < linear.tile_width[tile]; ++o) {
    const auto* codes = static_cast<const int8_t*>(row_of(operands[0], first + o, 1));
    const auto* scales = static_cast<const float*>(row_of(operands[1], first + o, 4));
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* block = block_of(linear, tile, g);
      const int64_t begin = g * linear.grouping.inputs, left = linear.inputs - begin;
      for (int64_t k = 0; k < (left < linear.grouping.inputs ? left : linear.grouping.inputs); ++k)
        put(block, o, k, codes[begin + k]);
      pack_scale(linear, block, o, scales[g]);
    }
  }
}

void pack_int8(Linear& linear, int64_t tile, int64_t first, const Operand* operands) {
  pack_bytes(linear, tile, first, operands, [](uint8_t* block, int o, int64_t k, int8_t value) {
    block[k / 2 * 64 + 2 * byte_place(o) + k % 2] = static_cast<uint8_t>(value < 0 ? 0x80 | -value : value);
  });
}

void pack_int6(Linear& linear, int64_t tile, int64_t first, const Operand* operands) {
  pack_bytes(linear, tile, first, operands, [](uint8_t* block, int o, int64_t k, int8_t value) {
    uint8_t* const at = block + k / 8 * 192 + 2 * byte_place(o) + k % 2;
    const int code = value + 32, word = static_cast<int>(k % 8 / 2);
    if (word < 3) {
      at[64 * word] = static_cast<uint8_t>(at[64 * word] | code);
    } else {
      for (int i = 0; i < 3; ++i) at[64 * i] = static_cast<uint8_t>(at[64 * i] | (code >> 2 * i & 3) << 6);
    }
  });
}

int64_t words(int64_t inputs) { return (inputs + 1) / 2; }
size_t bytes(const Linear& linear) { return static_cast<size_t>(groups_of(linear) * linear.block_bytes); }
int64_t no_scales(int64_t) { return 0; }
int bits_of(Kind kind) { return kind == Kind::int4 ? 4 : kind == Kind::int6 ? 6 : 8; }

}  // namespace

void set_grouping(Linear& linear, const Grouping& grouping) {
  linear.grouping = grouping;
  linear.code_bytes = grouping.inputs * kTile * bits_of(linear.kind) / 8;
  linear.block_bytes = linear.code_bytes + kTile * grouping.scale_bytes + (grouping.zeros != 0 ? 64 : 0);
}

const TileKind int4_tiles = {words, bytes, no_scales, pack_int4, nullptr};
const TileKind int6_tiles = {words, bytes, no_scales, pack_int6, nullptr};
const TileKind int8_tiles = {words, bytes, no_scales, pack_int8, nullptr};

}  // namespace iso
