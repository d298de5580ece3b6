// Packing of stored weights into tiles of any kind, multi-threaded.
#include "tile_kind.h"

namespace iso {

const TileKind& tile_kind(Kind kind) {
#define ISO_KIND(name, multiplication) &name##_tiles,
  static const TileKind* const kinds[] = {ISO_TILE_KINDS(ISO_KIND)};
#undef ISO_KIND
  return *kinds[static_cast<int>(kind)];
}

void pack_part(Pool& pool, Linear& linear, int part, const Operand* operands) {
  const TileKind& kind = tile_kind(linear.kind);
  const int64_t begin = linear.part_tile[part];
  auto tile = [&](int64_t i) { kind.pack(linear, begin + i, i * kTile, operands); };
  parallel(pool, linear.part_tile[part + 1] - begin, tile);
}

}  // namespace iso
