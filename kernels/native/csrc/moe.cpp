// A MoE layer whose experts are all in this process, in one call: what kernels/ops.py's Kernels.moe says, to the same
// bits.
#include <cstring>

#include "api.h"
#include "pieces.h"

namespace iso {

bool moe(Pool& pool, const Ops& ops, bool f32, const MoeLayer& layer, const MoeCall& call) {
  const size_t element = f32 ? 4 : 2;
  const int64_t T = call.rows, k = layer.router.top_k, pairs = T * k, experts = layer.router.experts,
                hidden = layer.router.hidden;
  // The shared expert joins the others where it has their shape: all rows go to it.
  const bool shared = layer.gate_up != nullptr, joined = shared && layer.down->inputs == layer.bank->inner;
  const int64_t active_most = (pairs < experts ? pairs : experts) + 1, all_pairs = pairs + (shared ? T : 0);
  Pieces pieces(1);
  const auto add = [&](int64_t count, size_t bytes) { return pieces.add(count * static_cast<int64_t>(bytes)); };
  const size_t at_ids = add(pairs, 4), at_weights = add(pairs, 4), at_outputs = add(pairs, sizeof(void*)),
               at_rows = add(all_pairs, 4), at_places = add(experts + 1, 8), at_offsets = add(active_most + 1, 8),
               at_gate_up = add(active_most, sizeof(void*)), at_down = add(active_most, sizeof(void*)),
               at_y = add(all_pairs * hidden, element);
  pieces.allocate();
  auto* ids = pieces.as<int32_t>(at_ids);
  auto* weights = pieces.as<float>(at_weights);
  ops.route(pool, f32, RouteCall{layer.router, call.x, hidden, T, ids, weights});

  // Pairs in the order of experts, then of rows.
  auto* places = pieces.as<int64_t>(at_places);  // where each expert's next pair goes
  std::memset(places, 0, static_cast<size_t>(experts + 1) * sizeof(int64_t));
  for (int64_t p = 0; p < pairs; ++p) ++places[ids[p] + 1];
  auto* offsets = pieces.as<int64_t>(at_offsets);
  auto** gate_up = pieces.as<const Linear*>(at_gate_up);
  auto** down = pieces.as<const Linear*>(at_down);
  int64_t active = 0;
  offsets[0] = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t count = places[e + 1];
    places[e + 1] += places[e];
    if (count == 0) continue;
    const int32_t slot = layer.slot_of[e];
    if (slot < 0 || slot >= layer.bank->slots || layer.bank->gate_up[slot] == nullptr) return false;
    gate_up[active] = layer.bank->gate_up[slot], down[active] = layer.bank->down[slot];
    offsets[++active] = places[e + 1];
  }
  auto* rows = pieces.as<int32_t>(at_rows);
  auto* y = pieces.as<uint8_t>(at_y);
  auto** outputs = pieces.as<const void*>(at_outputs);
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t place = places[ids[p]]++;
    outputs[p] = y + static_cast<size_t>(place * hidden) * element;
    rows[place] = static_cast<int32_t>(p / k);
  }
  uint8_t* own = shared ? y + static_cast<size_t>(pairs * hidden) * element : nullptr;
  if (joined) {
    gate_up[active] = layer.gate_up, down[active] = layer.down;
    for (int64_t t = 0; t < T; ++t) rows[pairs + t] = static_cast<int32_t>(t);
    offsets[++active] = all_pairs;
  }
  ops.experts(pool, f32,
              ExpertsCall{call.x, hidden, T, gate_up, down, active, joined ? all_pairs : pairs, layer.bank->inner,
                          hidden, rows, offsets, y, shared && !joined ? Upcoming{} : call.then});
  if (shared && !joined) {
    const int64_t all[] = {0, T};
    ops.experts(pool, f32,
                ExpertsCall{call.x, hidden, T, &layer.gate_up, &layer.down, 1, T, layer.down->inputs, hidden, nullptr,
                            all, own, call.then});
  }
  ops.combine(pool, f32, outputs, T, hidden, k, weights, own, call.residual, call.out);
  return true;
}

}  // namespace iso
