// Guesses of a multi-token-prediction layer in one call, pass after pass, made of `decoder`, `sample` and the
// operations of Ops: what kernels/ops.py's Kernels.draft says.
#include <algorithm>
#include <cstring>
#include <vector>

#include "api.h"
#include "pieces.h"

namespace iso {
namespace {

// Positions start … start+rows-1 of a stream, which go through the layer in one pass.
struct DraftSpan {
  int64_t stream, start, rows;
};

// Where the rows of one pass stand; what AttentionRows points to.
class PassRows {
 public:
  PassRows(const DraftLayer& layer, const DraftCall& call) : layer_(layer), call_(call) {
    const int32_t* table = call.tables;
    for (int64_t s = 0; s < call.count; ++s, table += call.streams[s - 1].blocks) tables_of_.push_back(table);
  }

  // Those in decode form come first.
  AttentionRows of(const std::vector<DraftSpan>& spans, bool may_expand) {
    const int64_t half = layer_.rotary / 2;
    for (auto* one : {&cos_, &sin_}) one->clear();
    for (auto* one : {&sequence_, &lengths_, &tables_}) one->clear();
    slots_.clear(), prefills_.clear();
    int64_t width = 0, decodes = 0;
    for (const DraftSpan& span : spans) width = std::max(width, call_.streams[span.stream].blocks);
    for (const DraftSpan& span : spans) {
      const DraftStream& stream = call_.streams[span.stream];
      const int32_t* table = tables_of_[static_cast<size_t>(span.stream)];
      const int64_t before = stream.skipped * call_.block_size, start = span.start - before;
      if (may_expand && stream.expanded != 0) {
        prefills_.push_back({static_cast<int64_t>(slots_.size()), span.rows, start, table, stream.blocks});
      } else {
        sequence_.insert(sequence_.end(), static_cast<size_t>(span.rows), static_cast<int32_t>(decodes++));
        for (int64_t p = start; p < start + span.rows; ++p) lengths_.push_back(static_cast<int32_t>(p + 1));
        tables_.insert(tables_.end(), table, table + stream.blocks);
        tables_.resize(static_cast<size_t>(decodes * width), 0);
      }
      for (int64_t p = start; p < start + span.rows; ++p) {
        slots_.push_back(table[p / call_.block_size] * call_.block_size + p % call_.block_size);
      }
      cos_.insert(cos_.end(), layer_.cos + span.start * half, layer_.cos + (span.start + span.rows) * half);
      sin_.insert(sin_.end(), layer_.sin + span.start * half, layer_.sin + (span.start + span.rows) * half);
    }
    return AttentionRows{static_cast<int64_t>(slots_.size()),
                         static_cast<int64_t>(sequence_.size()),
                         cos_.data(),
                         sin_.data(),
                         slots_.data(),
                         tables_.data(),
                         decodes,
                         width,
                         sequence_.data(),
                         lengths_.data(),
                         static_cast<int64_t>(prefills_.size()),
                         prefills_.data()};
  }

 private:
  const DraftLayer& layer_;
  const DraftCall& call_;
  std::vector<const int32_t*> tables_of_;
  std::vector<float> cos_, sin_;
  std::vector<int64_t> slots_;
  std::vector<int32_t> tables_, sequence_, lengths_;
  std::vector<PrefillRows> prefills_;
};

int64_t rows_of(const DraftCall& call) {
  int64_t rows = 0;
  for (int64_t s = 0; s < call.count; ++s) rows += call.streams[s].rows;
  return rows;
}

// A token for each row of logits. What cannot be drawn, of logits that are no numbers, is a guess like any other.
void guess(Pool& pool, const Ops& ops, const DraftCall& call, const std::vector<DraftSpan>& spans, int64_t pass,
           const float* logits, int64_t vocabulary, int64_t* tokens) {
  const size_t rows = spans.size();
  std::vector<double> temperature(rows), top_p(rows);
  std::vector<int64_t> top_k(rows), seed(rows), index(rows);
  for (size_t i = 0; i < rows; ++i) {
    const DraftStream& stream = call.streams[spans[i].stream];
    temperature[i] = stream.temperature, top_p[i] = stream.top_p, top_k[i] = stream.top_k, seed[i] = stream.seed;
    index[i] = stream.index + pass;
  }
  sample(pool, ops,
         SampleCall{logits, vocabulary, static_cast<int64_t>(rows), vocabulary, temperature.data(), top_p.data(),
                    top_k.data(), seed.data(), index.data(), tokens});
  for (size_t i = 0; i < rows; ++i) {
    tokens[i] = std::max<int64_t>(tokens[i], 0);
    call.out[spans[i].stream * call.most + pass] = tokens[i];
  }
}

}  // namespace

bool draft_fits(const DraftLayer& layer, const DraftCall& call) {
  const auto within = [](auto from, int64_t count, int64_t end) {
    return std::all_of(from, from + count, [&](int64_t v) { return v >= 0 && v < end; });
  };
  const int32_t* table = call.tables;
  bool expanded = false;
  for (int64_t s = 0; s < call.count; ++s) {
    const DraftStream& stream = call.streams[s];
    const int64_t end = stream.start + stream.rows + stream.guesses - 1, before = stream.skipped * call.block_size;
    if (stream.rows < 1 || stream.guesses < 1 || stream.guesses > call.most || stream.skipped < 0) return false;
    if (stream.start < before || end > layer.positions || end > before + stream.blocks * call.block_size) return false;
    if (!within(table, stream.blocks, call.blocks) || (expanded && stream.expanded == 0)) return false;
    table += stream.blocks, expanded = stream.expanded != 0;
  }
  const int64_t rows = rows_of(call);
  int64_t held = 0;
  for (int64_t p = 0; p < call.pieces; ++p) held += call.hidden[p].rows;
  return held == rows && within(call.tokens, rows, layer.vocabulary);
}

bool draft(Pool& pool, const Ops& ops, bool f32, const DraftLayer& layer, const DecoderLayer& decoder_layer,
           const DraftCall& call) {
  const int64_t T = rows_of(call), D = layer.eh_proj->outputs, V = layer.head->outputs;
  const auto bytes = [&](int64_t elements) { return static_cast<size_t>(elements) * (f32 ? 4 : 2); };
  Pieces pieces(1);
  const auto add = [&](int64_t elements) { return pieces.add(static_cast<int64_t>(bytes(elements))); };
  const size_t at_hidden = add(T * D), at_both = add(2 * T * D), at_x = add(T * D), at_h = add(T * D),
               at_other = add(T * D), at_logits = pieces.add(call.count * V * 4), at_tokens = pieces.add(T * 8);
  pieces.allocate(kDraft);
  uint8_t *hidden = pieces.at(at_hidden), *both = pieces.at(at_both), *x = pieces.at(at_x), *h = pieces.at(at_h),
          *other = pieces.at(at_other);
  auto* tokens = pieces.as<int64_t>(at_tokens);
  const auto norm = [&](const void* from, int64_t rows, const void* weight, void* to) {
    ops.rms_norm(pool, f32, from, D, rows, D, weight, layer.eps, nullptr, to);
  };

  const Cache cache{static_cast<uint8_t*>(decoder_layer.cache), call.block_size, decoder_layer.attention->latent,
                    decoder_layer.attention->rotary, call.fp8 != 0};
  PassRows where(layer, call);
  std::vector<DraftSpan> spans;
  for (int64_t s = 0; s < call.count; ++s) spans.push_back({s, call.streams[s].start, call.streams[s].rows});
  for (int64_t p = 0, row = 0; p < call.pieces; row += call.hidden[p++].rows) {
    norm(call.hidden[p].data, call.hidden[p].rows, layer.main_norm, hidden + bytes(row * D));
  }
  std::memcpy(tokens, call.tokens, static_cast<size_t>(T) * sizeof(int64_t));
  for (int64_t pass = 0; !spans.empty(); ++pass) {
    const AttentionRows rows = where.of(spans, pass == 0);
    for (int64_t t = 0; t < rows.rows; ++t) {
      uint8_t* to = both + bytes(2 * t * D);
      norm(static_cast<const uint8_t*>(layer.embedding) + bytes(tokens[t] * D), 1, layer.enorm, to);
      norm(hidden + bytes(t * D), 1, layer.hnorm, to + bytes(D));
    }
    ops.linear(pool, f32, *layer.eh_proj, both, 2 * D, rows.rows, x, false, Upcoming{decoder_layer.attention->input});
    attention(pool, ops, f32, *decoder_layer.attention, rows, x, cache, h);
    // Of all but a stream's last row only the latents are needed, and these are written.
    int64_t n = 0, last = -1;
    for (const DraftSpan& span : spans) {
      last += span.rows;
      for (uint8_t* all : {x, h}) std::memmove(all + bytes(n * D), all + bytes(last * D), bytes(D));
      ++n;
    }
    if (!feed_forward(pool, ops, f32, decoder_layer, MoeCall{h, x, n, other})) return false;
    norm(other, n, layer.norm, hidden);
    auto* logits = pieces.as<float>(at_logits);
    ops.linear(pool, f32, *layer.head, hidden, D, n, logits, true, {});
    guess(pool, ops, call, spans, pass, logits, V, tokens);

    size_t kept = 0;  // those that have another guess
    for (size_t i = 0; i < spans.size(); ++i) {
      const DraftSpan& span = spans[i];
      if (call.streams[span.stream].guesses <= pass + 1) continue;
      std::memmove(hidden + bytes(static_cast<int64_t>(kept) * D), hidden + bytes(static_cast<int64_t>(i) * D),
                   bytes(D));
      tokens[kept] = tokens[i];
      spans[kept++] = {span.stream, span.start + span.rows, 1};
    }
    spans.resize(kept);
  }
  return true;
}

}  // namespace iso
