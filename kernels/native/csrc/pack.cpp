// The kinds of tiles, and packing of stored weights into them, multi-threaded.
#include "tile_kind.h"

namespace iso {
namespace {

int64_t one(int64_t inputs) { return inputs; }
int64_t half(int64_t inputs) { return (inputs + 1) / 2; }
int64_t none(int64_t) { return 0; }
int64_t blocks(int64_t inputs) { return (inputs + kScaleBlock - 1) / kScaleBlock; }
size_t plain_bytes(int64_t words) { return static_cast<size_t>(words) * kPlainWord; }
size_t fp8_bytes(int64_t words) { return static_cast<size_t>(words) * kFp8Word; }
size_t coded_bytes(int64_t words) { return static_cast<size_t>((words + 1) / 2 * kCodedPair); }

constexpr TileKind kTileKinds[kKinds] = {
    {half, plain_bytes, none, pack_words, code},    // bf16
    {half, fp8_bytes, blocks, pack_fp8, nullptr},   // fp8
    {one, plain_bytes, none, pack_words, nullptr},  // f32
    {half, coded_bytes, none, nullptr, nullptr},    // coded
};

}  // namespace

const TileKind& tile_kind(Kind kind) { return kTileKinds[static_cast<int>(kind)]; }

void pack_part(Pool& pool, Linear& linear, int part, const Operand* operands) {
  const TileKind& kind = tile_kind(linear.kind);
  const int64_t begin = linear.part_tile[part];
  auto one_tile = [&](int64_t i) { kind.pack(linear, begin + i, i * kTile, operands); };
  parallel(pool, linear.part_tile[part + 1] - begin, one_tile);
}

}  // namespace iso
