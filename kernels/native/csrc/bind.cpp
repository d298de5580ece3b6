// The C functions that Python calls. Each returns 0, or an error code that kernels/native turns into an exception.
#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <vector>

#include "tile_kind.h"

using namespace iso;

#define ISO_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Error in kernels/native/context.py.
enum Error : int { kOk = 0, kOutOfMemory = 1, kIndexOutOfRange = 2, kEmptySlot = 3, kNotFinite = 4 };

constexpr int64_t kPassRows = 12;  // that share a pass over a weight, about

struct Context {
  Pool pool;
  const Ops* ops;
  bool f32;
  Context(int threads, const Ops* table, bool wide) : pool(threads), ops(table), f32(wide) {}

  // Experts whose weights take long to read get more threads than `pool` has: waking one costs little beside that, and
  // the cores that they share with others may be free. `threads`: with the caller. Throws std::system_error.
  void spread(int threads) { wide_ = std::make_unique<Pool>(threads); }
  Pool& for_experts(int64_t bytes) { return wide_ && bytes >= kLongRead ? *wide_ : pool; }

  // Threads for packing alone, made when there is something to pack: a group that loads experts computes with all
  // threads of `pool`. Throws std::system_error, std::bad_alloc.
  Pool& packing() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!packing_) packing_ = std::make_unique<Pool>(pool.size(), "packing");
    return *packing_;
  }

 private:
  static constexpr int64_t kLongRead = int64_t{4} << 20;  // for one thread some 200 µs
  std::mutex mutex_;
  std::unique_ptr<Pool> packing_, wide_;
};

template <class F>
int guarded(F body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  } catch (const std::system_error&) {  // nor for one more thread
    return kOutOfMemory;
  }
}

Cache cache_of(void* data, int64_t block_size, int64_t latent, int64_t rotary, int fp8) {
  return Cache{static_cast<uint8_t*>(data), block_size, latent, rotary, fp8 != 0};
}

bool within(const int32_t* values, int64_t count, int64_t end) {
  return std::all_of(values, values + count, [&](int32_t v) { return v >= 0 && v < end; });
}

bool slots_within(const int64_t* slots, int64_t rows, int64_t positions) {
  return std::all_of(slots, slots + rows, [&](int64_t s) { return s >= 0 && s < positions; });
}

bool decodes_within(const int32_t* sequence, const int32_t* lengths, int64_t rows, const int32_t* tables,
                    int64_t sequences, int64_t table_width, int64_t blocks, int64_t block_size) {
  if (!within(sequence, rows, sequences)) return false;
  for (int64_t t = 0; t < rows; ++t) {
    if (lengths[t] < 1 || lengths[t] > table_width * block_size) return false;
    if (!within(tables + sequence[t] * table_width, (lengths[t] + block_size - 1) / block_size, blocks)) return false;
  }
  return true;
}

bool rows_within(const AttentionRows& rows, int64_t blocks, int64_t block_size) {
  if (!slots_within(rows.slots, rows.rows, blocks * block_size)) return false;
  if (!decodes_within(rows.sequence, rows.lengths, rows.decodes, rows.tables, rows.sequences, rows.table_width, blocks,
                      block_size))
    return false;
  return std::all_of(rows.prefill, rows.prefill + rows.prefills, [&](const PrefillRows& chunk) {
    const int64_t used = (chunk.start + chunk.count + block_size - 1) / block_size;
    return chunk.start >= 0 && chunk.first >= rows.decodes && chunk.first + chunk.count <= rows.rows &&
           used <= chunk.table_width && within(chunk.table, used, blocks);
  });
}

}  // namespace

extern "C" void pool_rests(Context* context) { context->pool.rest(); }  // for exchange.cpp

// isa: 0 the best of this machine, 1 amx_bf16, 2 avx512_bf16, 3 avx2, 4 generic. Null when the machine lacks it.
ISO_EXPORT Context* iso_context_create(int threads, int isa, int f32) {
  const Ops* candidates[] = {amx_ops(), avx512_ops(), avx2_ops(), generic_ops()};
  const Ops* chosen = isa > 0 ? candidates[isa - 1] : nullptr;
  for (int i = 0; isa == 0 && chosen == nullptr; ++i) chosen = candidates[i];  // the generic path is always there
  if (chosen == nullptr) return nullptr;
  try {
    return new Context(std::max(threads, 1), chosen, f32 != 0);
  } catch (...) {
    return nullptr;
  }
}
// Of kernels/native/signatures.py, whose `interface()` gives it: it changes with the type of any function there.
ISO_EXPORT int iso_interface() { return 1511987922; }

ISO_EXPORT void iso_context_destroy(Context* context) { delete context; }
// Before anything is computed.
ISO_EXPORT int iso_context_spread(Context* context, int threads) {
  return guarded([&] {
    context->spread(threads);
    return kOk;
  });
}
ISO_EXPORT const char* iso_context_isa(const Context* context) { return context->ops->name; }

ISO_EXPORT Linear* iso_linear_create(int kind, int64_t inputs, int parts, const int64_t* part_outputs,
                                     const float* bias, const Grouping* grouping) {
  return create_linear(kind, inputs, parts, part_outputs, bias, grouping, 0);
}
// Room for a weight that was packed elsewhere into so many bytes of tiles (LinearForm). Null for no kind of tiles, too.
ISO_EXPORT Linear* iso_linear_room(int kind, int64_t inputs, int parts, const int64_t* part_outputs,
                                   const Grouping* grouping, int64_t data_bytes) {
  if (kind < 0 || kind >= kKinds || is_grouped(static_cast<Kind>(kind)) != (grouping != nullptr)) return nullptr;
  return create_linear(kind, inputs, parts, part_outputs, nullptr, grouping, static_cast<size_t>(data_bytes));
}
// After that room was filled.
ISO_EXPORT int iso_linear_adopt(Linear* linear) {
  const TileKind& its = tile_kind(linear->kind);
  const bool whole =
      its.adopt ? its.adopt(*linear) : linear->data_bytes == static_cast<size_t>(linear->tiles) * linear->tile_bytes;
  return whole ? kOk : kIndexOutOfRange;
}
ISO_EXPORT void iso_linear_form(const Linear* linear, LinearForm* form) {
  const auto scales = static_cast<int64_t>(static_cast<size_t>(linear->tiles * linear->scale_blocks) * sizeof(float));
  *form = LinearForm{static_cast<int>(linear->kind),
                     linear->bias != nullptr,
                     linear->grouping,
                     linear->data,
                     static_cast<int64_t>(linear->data_bytes),
                     linear->scales,
                     scales};
}
ISO_EXPORT void iso_linear_destroy(Linear* linear) { destroy(linear); }
ISO_EXPORT int64_t iso_linear_bytes(const Linear* linear) {
  return static_cast<int64_t>(linear->data_bytes +
                              static_cast<size_t>(linear->tiles * linear->scale_blocks) * sizeof(float));
}
// Operands: the tensors of one stored weight, as the linear's kind takes them.
ISO_EXPORT int iso_linear_pack(Context* context, Linear* linear, int part, const Operand* operands) {
  return guarded([&] {
    pack_part(context->packing(), *linear, part, operands);
    return kOk;
  });
}

// After all parts are packed.
ISO_EXPORT int iso_linear_finish(Context* context, Linear* linear) {
  return guarded([&] {
    if (const auto finish = tile_kind(linear->kind).finish) finish(context->packing(), *context->ops, *linear);
    return kOk;
  });
}

// RoundCall's operands and results. kNotFinite: a number is not, and int4 codes mean nothing.
ISO_EXPORT int iso_round(Context* context, int bits, const Operand* operands, int64_t rows, int64_t inputs, void* codes,
                         float* scales) {
  return guarded([&]() -> int {
    const Ops& ops = *context->ops;
    const auto round = bits == 4 ? ops.round_int4 : bits == 6 ? ops.round_int6 : ops.round_int8;
    const bool finite = round(context->pool, RoundCall{operands, rows, inputs, static_cast<uint8_t*>(codes), scales});
    return finite ? kOk : kNotFinite;
  });
}

ISO_EXPORT int iso_linear(Context* context, const Linear* weight, const void* x, int64_t x_stride, int64_t rows,
                          void* out, int out_f32) {
  return guarded([&] {
    context->ops->linear(context->pool, context->f32, *weight, x, x_stride, rows, out, out_f32 != 0, {});
    return kOk;
  });
}

ISO_EXPORT int iso_head_linear(Context* context, const Linear* weight, const void* x, int64_t x_row, int64_t x_head,
                               int64_t rows, void* out) {
  return guarded([&] {
    context->ops->head_linear(context->pool, context->f32, *weight, x, x_row, x_head, rows, out, {});
    return kOk;
  });
}

ISO_EXPORT int iso_mlp(Context* context, const Linear* gate_up, const Linear* down, const void* x, int64_t x_stride,
                       int64_t rows, void* out) {
  return guarded([&] {
    const int64_t offsets[] = {0, rows};
    context->ops->experts(
        context->pool, context->f32,
        ExpertsCall{x, x_stride, rows, &gate_up, &down, 1, rows, down->inputs, down->outputs, nullptr, offsets, out});
    return kOk;
  });
}

ISO_EXPORT void iso_bank_destroy(Bank* bank) {
  if (bank == nullptr) return;
  delete[] bank->gate_up;
  delete[] bank->down;
  delete bank;
}
ISO_EXPORT Bank* iso_bank_create(int64_t slots, int64_t hidden, int64_t inner) {
  auto* bank = new (std::nothrow) Bank();
  if (bank == nullptr) return nullptr;
  const auto count = static_cast<size_t>(slots);
  *bank =
      Bank{slots, hidden, inner, new (std::nothrow) const Linear*[count](), new (std::nothrow) const Linear*[count]()};
  if (bank->gate_up != nullptr && bank->down != nullptr) return bank;
  iso_bank_destroy(bank);
  return nullptr;
}
ISO_EXPORT void iso_bank_set(Bank* bank, int64_t slot, const Linear* gate_up, const Linear* down) {
  bank->gate_up[slot] = gate_up;
  bank->down[slot] = down;
}

ISO_EXPORT int iso_experts(Context* context, const Bank* bank, const void* x, int64_t x_stride, int64_t x_rows,
                           const int32_t* rows, int64_t pairs, const int32_t* slots, const int32_t* offsets,
                           int64_t active, void* out) {
  return guarded([&]() -> int {
    if (!within(rows, pairs, x_rows) || !within(slots, active, bank->slots)) return kIndexOutOfRange;
    if (offsets[0] != 0 || offsets[active] != pairs) return kIndexOutOfRange;
    std::vector<const Linear*> gate_up, down;
    std::vector<int64_t> begin{0};
    int64_t bytes = 0;
    for (int64_t a = 0; a < active; ++a) {
      if (offsets[a + 1] < offsets[a]) return kIndexOutOfRange;
      if (bank->gate_up[slots[a]] == nullptr) return kEmptySlot;
      gate_up.push_back(bank->gate_up[slots[a]]);
      down.push_back(bank->down[slots[a]]);
      begin.push_back(offsets[a + 1]);
      bytes += iso_linear_bytes(gate_up.back()) + iso_linear_bytes(down.back());
    }
    const int64_t passes = active == 0 ? 0 : (pairs / active + kPassRows - 1) / kPassRows;  // over a weight
    context->ops->experts(context->for_experts(bytes * passes), context->f32,
                          ExpertsCall{x, x_stride, x_rows, gate_up.data(), down.data(), active, pairs, bank->inner,
                                      bank->hidden, rows, begin.data(), out});
    return kOk;
  });
}

ISO_EXPORT int iso_mla_prefill(Context* context, const void* q, int64_t q_row, int64_t q_head, void* cache,
                               int64_t blocks, int64_t block_size, int fp8, const int32_t* table, int64_t start,
                               int64_t rows, int64_t heads, int64_t nope, int64_t rotary, int64_t value,
                               const Linear* kv_b, float scale, void* out) {
  return guarded([&]() -> int {
    if (!within(table, (start + rows + block_size - 1) / block_size, blocks)) return kIndexOutOfRange;
    context->ops->mla_prefill(context->pool, context->f32,
                              PrefillCall{q, q_row, q_head, cache_of(cache, block_size, kv_b->inputs, rotary, fp8),
                                          table, start, rows, heads, nope, value, kv_b, scale, out});
    return kOk;
  });
}

ISO_EXPORT int iso_mla_decode(Context* context, const void* q_latent, int64_t latent_row, int64_t latent_head,
                              const void* q_rope, int64_t rope_row, int64_t rope_head, void* cache, int64_t blocks,
                              int64_t block_size, int fp8, int64_t latent, int64_t rotary, const int32_t* tables,
                              int64_t sequences, int64_t table_width, const int32_t* sequence, const int32_t* lengths,
                              int64_t rows, int64_t heads, float scale, void* out) {
  return guarded([&]() -> int {
    if (!decodes_within(sequence, lengths, rows, tables, sequences, table_width, blocks, block_size))
      return kIndexOutOfRange;
    context->ops->mla_decode(context->pool, context->f32,
                             DecodeCall{q_latent, q_rope, latent_row, latent_head, rope_row, rope_head,
                                        cache_of(cache, block_size, latent, rotary, fp8), tables, table_width, sequence,
                                        lengths, rows, heads, scale, out});
    return kOk;
  });
}

ISO_EXPORT int iso_route(Context* context, const Router* router, const void* x, int64_t x_stride, int64_t rows,
                         int32_t* ids, float* weights) {
  return guarded([&] {
    context->ops->route(context->pool, context->f32, RouteCall{*router, x, x_stride, rows, ids, weights});
    return kOk;
  });
}

ISO_EXPORT int iso_moe(Context* context, const MoeLayer* layer, const void* x, const void* residual, int64_t rows,
                       void* out) {
  return guarded([&] {
    const bool held = moe(context->pool, *context->ops, context->f32, *layer, MoeCall{x, residual, rows, out});
    return held ? kOk : kEmptySlot;
  });
}

ISO_EXPORT int iso_rms_norm(Context* context, const void* x, int64_t x_stride, int64_t rows, int64_t width,
                            const void* weight, float eps, void* residual, void* out) {
  return guarded([&] {
    context->ops->rms_norm(context->pool, context->f32, x, x_stride, rows, width, weight, eps, residual, out);
    return kOk;
  });
}

ISO_EXPORT int iso_rope(Context* context, const void* x, int64_t x_row, int64_t x_head, int64_t rows, int64_t heads,
                        int64_t width, const float* cos, const float* sin, void* out) {
  return guarded([&] {
    context->ops->rope(context->pool, context->f32, x, x_row, x_head, rows, heads, width, cos, sin, out, heads * width,
                       width);
    return kOk;
  });
}

ISO_EXPORT int iso_combine(Context* context, const void* y, int64_t pairs, int64_t rows, int64_t width, int64_t k,
                           const int64_t* index, const float* weights, const void* own, const void* residual,
                           void* out) {
  return guarded([&]() -> int {
    if (!std::all_of(index, index + rows * k, [&](int64_t i) { return i >= 0 && i < pairs; })) return kIndexOutOfRange;
    std::vector<const void*> outputs(static_cast<size_t>(rows * k));
    const int64_t row_bytes = width * (context->f32 ? 4 : 2);
    for (size_t p = 0; p < outputs.size(); ++p) outputs[p] = static_cast<const uint8_t*>(y) + index[p] * row_bytes;
    context->ops->combine(context->pool, context->f32, outputs.data(), rows, width, k, weights, own, residual, out);
    return kOk;
  });
}

// As iso_combine, from outputs that lie apart: [rows, k].
ISO_EXPORT int iso_combine_outputs(Context* context, const void* const* outputs, int64_t rows, int64_t width, int64_t k,
                                   const float* weights, const void* own, const void* residual, void* out) {
  return guarded([&] {
    context->ops->combine(context->pool, context->f32, outputs, rows, width, k, weights, own, residual, out);
    return kOk;
  });
}

ISO_EXPORT int iso_write_cache(Context* context, const void* latent, int64_t latent_stride, int64_t latent_width,
                               const void* rope, int64_t rope_stride, int64_t rope_width, void* cache,
                               int64_t positions, int fp8, const int64_t* slots, int64_t rows) {
  return guarded([&]() -> int {
    if (!slots_within(slots, rows, positions)) return kIndexOutOfRange;
    write_cache(context->pool, *context->ops, context->f32, latent, latent_stride, rope, rope_stride,
                cache_of(cache, 1, latent_width, rope_width, fp8), slots, rows);
    return kOk;
  });
}

ISO_EXPORT int iso_attention(Context* context, const AttentionWeights* weights, const AttentionRows* rows, void* x,
                             void* cache, int64_t blocks, int64_t block_size, int fp8, void* out) {
  return guarded([&]() -> int {
    if (!rows_within(*rows, blocks, block_size)) return kIndexOutOfRange;
    attention(context->pool, *context->ops, context->f32, *weights, *rows, x,
              cache_of(cache, block_size, weights->latent, weights->rotary, fp8), out);
    return kOk;
  });
}

ISO_EXPORT int iso_decoder(Context* context, const DecoderLayer* layers, int64_t count, const AttentionRows* rows,
                           const DecoderRows* to) {
  return guarded([&]() -> int {
    if (!rows_within(*rows, to->blocks, to->block_size)) return kIndexOutOfRange;
    return decoder(context->pool, *context->ops, context->f32, layers, count, *rows, *to) ? kOk : kEmptySlot;
  });
}

ISO_EXPORT int iso_draft(Context* context, const DraftLayer* layer, const DecoderLayer* decoder_layer,
                         const DraftCall* call) {
  return guarded([&]() -> int {
    if (!draft_fits(*layer, *call)) return kIndexOutOfRange;
    return draft(context->pool, *context->ops, context->f32, *layer, *decoder_layer, *call) ? kOk : kEmptySlot;
  });
}

ISO_EXPORT int iso_forbid(Context* context, float* logits, int64_t stride, int64_t vocab, const int64_t* at,
                          int64_t rows, const uint32_t* allowed, int64_t words) {
  return guarded([&] {
    auto body = [&](int64_t r) { context->ops->sample.forbid(logits + at[r] * stride, vocab, allowed + r * words); };
    parallel(context->pool, rows, body);
    return kOk;
  });
}

ISO_EXPORT int iso_sample(Context* context, const float* logits, int64_t stride, int64_t rows, int64_t vocab,
                          const double* temperature, const double* top_p, const int64_t* top_k, const int64_t* seed,
                          const int64_t* index, int64_t* out) {
  return guarded([&] {
    sample(context->pool, *context->ops,
           SampleCall{logits, stride, rows, vocab, temperature, top_p, top_k, seed, index, out});
    return kOk;
  });
}
