// Packed weights as memory: their places, made for a shape and kind, and freed.
#include <algorithm>
#include <cstring>
#include <new>

#include "tile_kind.h"

namespace iso {
namespace {

template <class T>
T* array(size_t count) {
  T* out = static_cast<T*>(allocate(count * sizeof(T)));
  return out;
}

}  // namespace

void destroy(Linear* linear) {
  if (linear == nullptr) return;
  release(linear->data, linear->data_bytes);
  release(linear->scales, static_cast<size_t>(linear->tiles * linear->scale_blocks) * sizeof(float));
  release(linear->bias, static_cast<size_t>(linear->tiles * kTile) * sizeof(float));
  release(linear->part_tile, static_cast<size_t>(linear->parts + 1) * sizeof(int64_t));
  release(linear->tile_column, static_cast<size_t>(linear->tiles) * sizeof(int64_t));
  release(linear->tile_width, static_cast<size_t>(linear->tiles) * sizeof(int32_t));
  delete linear;
}

Linear* create_linear(int kind, int64_t inputs, int parts, const int64_t* part_outputs, const float* bias,
                      const Grouping* grouping, size_t data_bytes) {
  auto* linear = new (std::nothrow) Linear();
  if (linear == nullptr) return nullptr;
  try {
    linear->kind = static_cast<Kind>(kind);
    linear->inputs = inputs;
    if (grouping != nullptr) set_grouping(*linear, *grouping);
    const TileKind& its = tile_kind(linear->kind);
    linear->words = its.words(inputs);
    linear->tile_bytes = its.tile_bytes(*linear);
    linear->part_tile = array<int64_t>(static_cast<size_t>(parts) + 1);
    linear->parts = parts;
    for (int p = 0; p < parts; ++p) {
      linear->part_tile[p] = linear->tiles;
      linear->tiles += (part_outputs[p] + kTile - 1) / kTile;
    }
    linear->part_tile[parts] = linear->tiles;
    linear->scale_blocks = its.scale_blocks(inputs);
    const auto tiles = static_cast<size_t>(linear->tiles);
    linear->tile_column = array<int64_t>(tiles);
    linear->tile_width = array<int32_t>(tiles);
    for (int p = 0; p < parts; ++p) {
      for (int64_t t = linear->part_tile[p], o = 0; t < linear->part_tile[p + 1]; ++t, o += kTile) {
        linear->tile_column[t] = linear->outputs + o;
        linear->tile_width[t] = static_cast<int32_t>(std::min<int64_t>(kTile, part_outputs[p] - o));
      }
      linear->outputs += part_outputs[p];
    }
    if (linear->scale_blocks > 0) linear->scales = array<float>(tiles * static_cast<size_t>(linear->scale_blocks));
    if (bias != nullptr) {
      linear->bias = array<float>(tiles * kTile);
      std::memset(linear->bias, 0, tiles * kTile * sizeof(float));
      for (int64_t t = 0; t < linear->tiles; ++t) {
        std::memcpy(linear->bias + t * kTile, bias + linear->tile_column[t],
                    static_cast<size_t>(linear->tile_width[t]) * sizeof(float));
      }
    }
    linear->data_bytes = data_bytes > 0 ? data_bytes : tiles * linear->tile_bytes;
    linear->data = array<uint8_t>(linear->data_bytes);
    return linear;
  } catch (const std::bad_alloc&) {
    destroy(linear);
    return nullptr;
  }
}

}  // namespace iso
