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

// The router's weights, which no product reads.
static Span gate_of(const DecoderLayer& layer) {
  if (layer.moe == nullptr) return Span{nullptr, 0};
  const Router& router = layer.moe->router;
  return Span{static_cast<const uint8_t*>(router.weight),
              router.experts * router.hidden * (router.narrow != 0 ? 2 : 4)};
}

bool decoder(Pool& pool, const Ops& ops, bool f32, const DecoderLayer* layers, int64_t count, const AttentionRows& rows,
             const DecoderRows& to) {
  void *x = to.x, *other = to.other;
  for (const DecoderLayer* layer = layers; layer != layers + count; ++layer, std::swap(x, other)) {
    const AttentionWeights& a = *layer->attention;
    const Cache cache{static_cast<uint8_t*>(layer->cache), to.block_size, a.latent, a.rotary, to.fp8 != 0};
    const Upcoming then{layer + 1 < layers + count ? layer[1].attention->input : nullptr};
    const Span gate = gate_of(*layer);
    attention(pool, ops, f32, a, rows, x, cache, to.h, Upcoming{nullptr, false, &gate, 1});
    if (!feed_forward(pool, ops, f32, *layer, MoeCall{to.h, x, rows.rows, other, then})) return false;
  }
  return true;
}

}  // namespace iso
