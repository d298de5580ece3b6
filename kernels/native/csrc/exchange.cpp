#include "exchange.h"

#if defined(__linux__)

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "memory.h"

#define ISO_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {  // of bind.cpp
int iso_route(Context* context, const iso::Router* router, const void* x, int64_t x_stride, int64_t rows, int32_t* ids,
              float* weights);
int iso_mlp(Context* context, const iso::Linear* gate_up, const iso::Linear* down, const void* x, int64_t x_stride,
            int64_t rows, void* out);
int iso_combine_outputs(Context* context, const void* const* outputs, int64_t rows, int64_t width, int64_t k,
                        const float* weights, const void* own, const void* residual, void* out);
int iso_attention(Context* context, const iso::AttentionWeights* weights, const iso::AttentionRows* rows, void* x,
                  void* cache, int64_t blocks, int64_t block_size, int fp8, void* out);
void pool_rests(Context* context);
}

namespace iso {

Exchange::Exchange(Context* context, End* const* ends, int64_t groups)
    : context_(context), ends_(ends, ends + groups), shares_(static_cast<size_t>(groups)) {}

// Pairs in the order of experts, then of rows, each to the group that holds its copy.
void Exchange::split(const ExchangeLayer& layer, const int32_t* ids, int64_t rows, int64_t turn) {
  const int64_t k = layer.router.top_k, pairs = rows * k;
  places_.assign(static_cast<size_t>(layer.router.experts + 1), 0);
  order_.resize(static_cast<size_t>(pairs));
  for (int64_t p = 0; p < pairs; ++p) ++places_[static_cast<size_t>(ids[p] + 1)];
  for (int64_t e = 0; e < layer.router.experts; ++e)
    places_[static_cast<size_t>(e + 1)] += places_[static_cast<size_t>(e)];
  for (int64_t p = 0; p < pairs; ++p) order_[static_cast<size_t>(places_[static_cast<size_t>(ids[p])]++)] = p;
  for (Share& share : shares_) {
    share.experts.clear(), share.offsets.clear(), share.rows.clear(), share.sent.clear(), share.pairs.clear();
  }
  int64_t rank = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t pair = order_[static_cast<size_t>(i)];
    const int32_t expert = ids[pair];
    rank = i > 0 && ids[order_[static_cast<size_t>(i - 1)]] == expert ? rank + 1 : 0;
    Share& share =
        shares_[static_cast<size_t>(layer.copies[expert * layer.most + (rank + turn) % layer.count[expert]])];
    if (share.experts.empty() || share.experts.back() != expert) {
      share.experts.push_back(expert);
      share.offsets.push_back(static_cast<int32_t>(share.pairs.size()));
    }
    share.pairs.push_back(pair);
  }
  for (Share& share : shares_) {
    if (share.pairs.empty()) continue;
    share.offsets.push_back(static_cast<int32_t>(share.pairs.size()));
    row_number_.assign(static_cast<size_t>(rows), -1);
    for (const int64_t pair : share.pairs) row_number_[static_cast<size_t>(pair / k)] = 0;
    int32_t needed = 0;
    for (int64_t t = 0; t < rows; ++t) {
      if (row_number_[static_cast<size_t>(t)] < 0) continue;
      row_number_[static_cast<size_t>(t)] = needed++;
      share.sent.push_back(static_cast<int32_t>(t));
    }
    if (needed == rows) share.sent.clear();
    for (const int64_t pair : share.pairs) share.rows.push_back(row_number_[static_cast<size_t>(pair / k)]);
  }
}

// False where nothing was sent, or not everything: `pairs_sent` says what was.
bool Exchange::send(const ExchangeLayer& layer, const ExchangeStep& step) {
  const int64_t element = layer.f32 != 0 ? 4 : 2, row_bytes = layer.router.hidden * element;
  std::vector<Request> requests(ends_.size());
  for (size_t g = 0; g < ends_.size(); ++g) {
    const Share& share = shares_[g];
    if (share.pairs.empty()) continue;
    const auto active = static_cast<int64_t>(share.experts.size()), pairs = static_cast<int64_t>(share.pairs.size());
    const int64_t rows = share.sent.empty() ? step.rows : static_cast<int64_t>(share.sent.size());
    const int64_t reply_at = Layout::of(active, pairs, rows * row_bytes).end;
    // The caller has the segment grown, or says what is wrong with the link.
    if (reply_at + std::max(pairs * row_bytes, kLeastReply) > ends_[g]->header->bytes.load(std::memory_order_acquire) ||
        ends_[g]->peer() != kReady) {
      return false;
    }
    requests[g] = Request{layer.layer, layer.version, active, pairs, rows, row_bytes, layer.f32 != 0 ? 0 : 1, reply_at};
  }
  bool whole = true;
  for (size_t g = 0; g < ends_.size(); ++g) {
    const Share& share = shares_[g];
    if (share.pairs.empty()) continue;
    if (ends_[g]->send(requests[g], share.experts.data(), share.offsets.data(), share.rows.data(),
                       static_cast<const uint8_t*>(step.x), step.x_stride * element,
                       share.sent.empty() ? nullptr : share.sent.data()) == kReady) {
      step.pairs_sent[g] = static_cast<int32_t>(share.pairs.size());
    } else {
      whole = false;
    }
  }
  return whole;
}

void Exchange::count(const ExchangeLayer& layer, const ExchangeStep& step) const {
  for (const Share& share : shares_) {
    for (size_t a = 0; a < share.experts.size(); ++a)
      layer.rows_routed[share.experts[a]] += share.offsets[a + 1] - share.offsets[a];
  }
  // An expert was read once, wherever its copies are.
  const int64_t pairs = step.rows * layer.router.top_k;
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t expert = step.ids[order_[static_cast<size_t>(i)]];
    if (i == 0 || step.ids[order_[static_cast<size_t>(i - 1)]] != expert) ++layer.reads[expert];
  }
}

// False where an answer is not there in time, or is none: it can be asked for again.
bool Exchange::receive(const ExchangeLayer& layer, const ExchangeStep& step) {
  const int64_t row_bytes = layer.router.hidden * (layer.f32 != 0 ? 4 : 2);
  outputs_.resize(static_cast<size_t>(step.rows * layer.router.top_k));
  for (size_t g = 0; g < ends_.size(); ++g) {
    const Share& share = shares_[g];
    if (share.pairs.empty()) continue;
    const int64_t began = now_ns();
    const bool came = ends_[g]->reply_comes(began + step.patience);
    const int64_t waited = now_ns() - began;
    step.waited[g] += waited;
    *step.longest = std::max(*step.longest, waited);
    const Header& header = *ends_[g]->header;
    if (!came || header.reply_kind != kOutputs ||
        header.reply_bytes != static_cast<int64_t>(share.pairs.size()) * row_bytes) {
      return false;
    }
    const uint8_t* output = ends_[g]->header->at(header.request.reply_at);
    for (const int64_t pair : share.pairs) {
      outputs_[static_cast<size_t>(pair)] = output;
      output += row_bytes;
    }
  }
  return true;
}

Exchange::Result Exchange::layer(const ExchangeLayer& layer, const ExchangeStep& step) {
  std::fill_n(step.pairs_sent, ends_.size(), 0);
  if (iso_route(context_, &layer.router, step.x, step.x_stride, step.rows, step.ids, step.weights) != 0) {
    return kOutOfMemory;
  }
  split(layer, step.ids, step.rows, step.turn);
  const bool sent = send(layer, step);
  count(layer, step);  // while the groups compute
  if (!sent) return kNotSent;
  const void* own = nullptr;
  if (layer.gate_up != nullptr) {
    auto* sum =
        scratch_of<uint8_t>(kLayer, static_cast<size_t>(step.rows * layer.router.hidden * (layer.f32 != 0 ? 4 : 2)));
    if (iso_mlp(context_, layer.gate_up, layer.down, step.x, step.x_stride, step.rows, sum) != 0) return kOutOfMemory;
    own = sum;
  }
  pool_rests(context_);  // the groups may need the cores
  if (!receive(layer, step)) return kNotAnswered;
  return iso_combine_outputs(context_, outputs_.data(), step.rows, layer.router.hidden, layer.router.top_k,
                             step.weights, own, step.residual, step.out) == 0
             ? kWhole
             : kOutOfMemory;
}

Exchange::Result Exchange::layers(const FarLayer* layers, int64_t count, ExchangeStep step, FarStep* far) {
  const int64_t until = now_ns() + far->budget;
  const auto wanted = [&] {
    return __atomic_load_n(far->wanted[0], __ATOMIC_RELAXED) != 0 ||
           __atomic_load_n(far->wanted[1], __ATOMIC_RELAXED) != 0 || now_ns() >= until;
  };
  const DecoderRows& to = far->to;
  void *x = to.x, *other = to.other;
  for (far->at = 0; far->at < count; ++far->at, std::swap(x, other)) {
    const FarLayer& layer = layers[far->at];
    std::fill_n(step.pairs_sent, ends_.size(), 0);
    const int code = iso_attention(context_, layer.attention, far->rows, x, layer.cache, to.blocks, to.block_size,
                                   static_cast<int>(to.fp8), to.h);
    if (code != 0) return static_cast<Result>(code);
    if (layer.moe == nullptr) {
      const int64_t hidden = layer.down->outputs;
      if (iso_mlp(context_, layer.gate_up, layer.down, to.h, hidden, step.rows, other) != 0 ||
          iso_combine_outputs(context_, nullptr, step.rows, hidden, 0, nullptr, other, x, other) != 0) {
        return kOutOfMemory;
      }
      continue;
    }
    if (wanted()) return kGivenUp;
    step.x = to.h, step.residual = x, step.out = other, step.turn = layer.turn;
    step.x_stride = layer.moe->router.hidden;
    if (const Result result = this->layer(*layer.moe, step); result != kWhole) return result;
  }
  return kWhole;
}

}  // namespace iso

using namespace iso;

// `ends`: the shard's ends of the links to all groups; they and the context must outlive this.
ISO_EXPORT Exchange* iso_exchange_create(Context* context, End* const* ends, int64_t groups) {
  try {
    return new Exchange(context, ends, groups);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
ISO_EXPORT void iso_exchange_destroy(Exchange* exchange) { delete exchange; }

// → an Exchange::Result.
ISO_EXPORT int iso_exchange_layer(Exchange* exchange, const ExchangeLayer* layer, const ExchangeStep* step) {
  try {
    return exchange->layer(*layer, *step);
  } catch (const std::bad_alloc&) {
    return Exchange::kOutOfMemory;
  }
}
ISO_EXPORT int iso_exchange_layers(Exchange* exchange, const FarLayer* layers, int64_t count, const ExchangeStep* step,
                                   FarStep* far) {
  try {
    return exchange->layers(layers, count, *step, far);
  } catch (const std::bad_alloc&) {
    return Exchange::kOutOfMemory;
  }
}

#endif
