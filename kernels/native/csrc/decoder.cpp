// Decoder layers in one call, made of `attention`, `moe` and the operations of Ops: what kernels/ops.py's
// Kernels.decoder says, to the same bits.
#include <utility>

#include "api.h"

namespace iso {

bool feed_forward(Pool& pool, const Ops& ops, bool f32, const DecoderLayer& layer, const MoeCall& call) {
  if (layer.moe != nullptr) return moe(pool, ops, f32, *layer.moe, call);
  const int64_t hidden = layer.down->outputs, all[] = {0, call.rows};
  ops.experts(pool, f32,
              ExpertsCall{call.x, hidden, call.rows, &layer.gate_up, &layer.down, 1, call.rows, layer.down->inputs,
                          hidden, nullptr, all, call.out, call.then});
  ops.combine(pool, f32, nullptr, call.rows, hidden, 0, nullptr, call.out, call.residual, call.out);
  return true;
}

bool decoder(Pool& pool, const Ops& ops, bool f32, const DecoderLayer* layers, int64_t count, const AttentionRows& rows,
             const DecoderRows& to) {
  void *x = to.x, *other = to.other;
  for (const DecoderLayer* layer = layers; layer != layers + count; ++layer, std::swap(x, other)) {
    const AttentionWeights& a = *layer->attention;
    const Cache cache{static_cast<uint8_t*>(layer->cache), to.block_size, a.latent, a.rotary, to.fp8 != 0};
    const Upcoming then{layer + 1 < layers + count ? layer[1].attention->input : nullptr};
    attention(pool, ops, f32, a, rows, x, cache, to.h);
    if (!feed_forward(pool, ops, f32, *layer, MoeCall{to.h, x, rows.rows, other, then})) return false;
  }
  return true;
}

}  // namespace iso
