// Decoder layers in one call, made of `attention`, `moe` and the operations of Ops: what kernels/ops.py's
// Kernels.decoder says, to the same bits.
#include <utility>

#include "api.h"

namespace iso {

bool decoder(Pool& pool, const Ops& ops, bool f32, const DecoderLayer* layers, int64_t count, const AttentionRows& rows,
             const DecoderRows& to) {
  void *x = to.x, *other = to.other;
  for (const DecoderLayer* layer = layers; layer != layers + count; ++layer, std::swap(x, other)) {
    const AttentionWeights& a = *layer->attention;
    const Cache cache{static_cast<uint8_t*>(layer->cache), to.block_size, a.latent, a.rotary, to.fp8 != 0};
    const Upcoming then{layer + 1 < layers + count ? layer[1].attention->input : nullptr};
    attention(pool, ops, f32, a, rows, x, cache, to.h);
    if (layer->moe != nullptr) {
      if (!moe(pool, ops, f32, *layer->moe, MoeCall{to.h, x, rows.rows, other, then})) return false;
      continue;
    }
    const int64_t hidden = layer->down->outputs, all[] = {0, rows.rows};
    ops.experts(pool, f32,
                ExpertsCall{to.h, hidden, rows.rows, &layer->gate_up, &layer->down, 1, rows.rows, layer->down->inputs,
                            hidden, nullptr, all, other, then});
    ops.combine(pool, f32, nullptr, rows.rows, hidden, 0, nullptr, other, x, other);
  }
  return true;
}

}  // namespace iso
