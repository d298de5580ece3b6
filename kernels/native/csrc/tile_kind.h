// What a kind of tile must say of itself, beside how each instruction set multiplies by it (`multiply_tile` in tile.h).
#pragma once

#include "api.h"

namespace iso {

struct TileKind {
  int64_t (*words)(int64_t inputs);         // of a row of a tile
  size_t (*tile_bytes)(const Linear&);      // of a tile, by `words` and `grouping`; what is its alone may lie within
  int64_t (*scale_blocks)(int64_t inputs);  // how many of Linear::scales a tile has
  // Fills tile `tile`, whose first output is row `first` of the operands: the tensors of a stored weight, in the order
  // that its format gives them (kernels/formats). Null: made from another kind by its `finish`.
  void (*pack)(Linear&, int64_t tile, int64_t first, const Operand* operands);
  // After all parts are packed. Null: nothing is left to do.
  void (*finish)(Pool&, const Ops&, Linear&);
  // After `data` was filled with a packed weight's bytes from elsewhere: whether they can be one's. Null: any can.
  bool (*adopt)(Linear&) = nullptr;
};

const TileKind& tile_kind(Kind);
void set_grouping(Linear&, const Grouping&);  // of integers, before all else

#define ISO_KIND(name, multiplication) extern const TileKind name##_tiles;
ISO_TILE_KINDS(ISO_KIND)
#undef ISO_KIND

}  // namespace iso
