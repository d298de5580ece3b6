// A layer's attention in one call, made of the operations of Ops: what kernels/ops.py's Kernels.attention says, to the
// same bits.
#include <algorithm>
#include <cstring>
#include <vector>

#include "api.h"
#include "pieces.h"

namespace iso {
void write_cache(Pool& pool, const Ops& ops, bool f32, const void* latent, int64_t latent_row, const void* rope,
                 int64_t rope_row, const Cache& cache, const int64_t* slots, int64_t rows) {
  if (cache.fp8) return ops.write_fp8(pool, f32, latent, latent_row, rope, rope_row, cache, slots, rows);
  const size_t element = f32 ? 4 : 2;
  const auto bytes = [&](int64_t elements) { return static_cast<size_t>(elements) * element; };
  for (int64_t t = 0; t < rows; ++t) {
    auto* to = cache.data + bytes(slots[t] * (cache.latent + cache.rotary));
    std::memcpy(to, static_cast<const uint8_t*>(latent) + bytes(t * latent_row), bytes(cache.latent));
    std::memcpy(to + bytes(cache.latent), static_cast<const uint8_t*>(rope) + bytes(t * rope_row), bytes(cache.rotary));
  }
}

namespace {

// The cache's entries that a row which decodes alone will read, the first half megabyte of them.
std::vector<Span> entries_of_one(const AttentionRows& rows, const Cache& cache, size_t element) {
  std::vector<Span> spans;
  if (rows.decodes != 1) return spans;
  const int64_t bytes = cache.row_bytes(element), cached = std::min<int64_t>(rows.lengths[0] - 1, (512 << 10) / bytes);
  const int32_t* table = rows.tables + rows.sequence[0] * rows.table_width;
  for (int64_t p = 0; p < cached; p += cache.block_size) {
    const int64_t count = std::min(cache.block_size, cached - p);
    spans.push_back(Span{cache.data + table[p / cache.block_size] * cache.block_size * bytes, count * bytes});
  }
  return spans;
}

}  // namespace

void attention(Pool& pool, const Ops& ops, bool f32, const AttentionWeights& a, const AttentionRows& rows, void* x,
               const Cache& cache, void* out, const Upcoming& then) {
  const size_t element = f32 ? 4 : 2;
  const int64_t T = rows.rows, n = rows.decodes, hidden = a.o->outputs, width = a.input->outputs, latent = a.latent,
                rotary = a.rotary;
  const int64_t low_rank = width - latent - rotary, head = a.nope + rotary, query = a.heads * head,
                values = a.heads * a.value;
  Pieces pieces(element);
  const size_t at_h = pieces.add(T * hidden), at_input = pieces.add(T * width),
               at_low = pieces.add(a.q_b == nullptr ? 0 : T * low_rank),
               at_query = pieces.add(a.q_b == nullptr ? 0 : T * query), at_kv = pieces.add(T * latent),
               at_key = pieces.add(T * rotary), at_q_latent = pieces.add(n * a.heads * latent),
               at_out_latent = pieces.add(n * a.heads * latent), at_values = pieces.add(T * values);
  pieces.allocate();
  auto* h = pieces.at(at_h);
  auto* input = pieces.at(at_input);
  const Upcoming absorbed{n > 0 ? a.k_absorb : nullptr, true};
  ops.rms_norm(pool, f32, x, hidden, T, hidden, a.norm, a.eps, nullptr, h);
  ops.linear(pool, f32, *a.input, h, hidden, T, input, false, a.q_b != nullptr ? Upcoming{a.q_b} : absorbed);

  uint8_t* q = input;
  int64_t q_row = width;
  if (a.q_b != nullptr) {
    q = pieces.at(at_query), q_row = query;
    ops.rms_norm(pool, f32, input, width, T, low_rank, a.q_norm, a.latent_eps, nullptr, pieces.at(at_low));
    ops.linear(pool, f32, *a.q_b, pieces.at(at_low), low_rank, T, q, false, absorbed);
  }
  uint8_t* q_rope = q + static_cast<size_t>(a.nope) * element;
  ops.rope(pool, f32, q_rope, q_row, head, T, a.heads, rotary, rows.cos, rows.sin, q_rope, q_row, head);

  const uint8_t* kv = input + static_cast<size_t>(low_rank) * element;
  ops.rms_norm(pool, f32, kv, width, T, latent, a.kv_norm, a.latent_eps, nullptr, pieces.at(at_kv));
  ops.rope(pool, f32, kv + static_cast<size_t>(latent) * element, width, 0, T, 1, rotary, rows.cos, rows.sin,
           pieces.at(at_key), rotary, rotary);
  write_cache(pool, ops, f32, pieces.at(at_kv), latent, pieces.at(at_key), rotary, cache, rows.slots, T);

  uint8_t* value = pieces.at(at_values);
  if (n > 0) {
    const std::vector<Span> entries = entries_of_one(rows, cache, element);
    ops.head_linear(pool, f32, *a.k_absorb, q, q_row, head, n, pieces.at(at_q_latent),
                    Upcoming{a.v_absorb, true, entries.data(), static_cast<int64_t>(entries.size())});
    ops.mla_decode(
        pool, f32,
        DecodeCall{pieces.at(at_q_latent), q_rope, a.heads * latent, latent, q_row, head, cache, rows.tables,
                   rows.table_width, rows.sequence, rows.lengths, n, a.heads, a.scale, pieces.at(at_out_latent)});
    ops.head_linear(pool, f32, *a.v_absorb, pieces.at(at_out_latent), a.heads * latent, latent, n, value,
                    Upcoming{a.o});
  }
  for (int64_t p = 0; p < rows.prefills; ++p) {
    const PrefillRows& chunk = rows.prefill[p];
    const auto skipped = static_cast<size_t>(chunk.first);
    ops.mla_prefill(pool, f32,
                    PrefillCall{q + skipped * static_cast<size_t>(q_row) * element, q_row, head, cache, chunk.table,
                                chunk.start, chunk.count, a.heads, a.nope, a.value, a.kv_b, a.scale,
                                value + skipped * static_cast<size_t>(values) * element});
  }
  ops.linear(pool, f32, *a.o, value, values, T, h, false, then);
  ops.rms_norm(pool, f32, h, hidden, T, hidden, a.post_norm, a.eps, x, out);
}

}  // namespace iso
