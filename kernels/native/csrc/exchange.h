// MoE layers whose experts are in other processes, one of them in one call, or one after another with the attention
// before each: what actors/attention/exchange.py does where every group is reached through shared memory, to the same
// bits. It undoes nothing: where a group does not answer, its
// caller goes on from what was sent.
#pragma once

#if defined(__linux__)

#include <cstdint>
#include <vector>

#include "api.h"
#include "ring.h"

struct Context;

namespace iso {

// What stays the same from step to step. Python fills it: see _Layer in exchange.py.
struct ExchangeLayer {
  int64_t layer, version;
  Router router;
  int f32;                        // float32 rows, otherwise bfloat16
  const Linear *gate_up, *down;   // the shared experts, or null
  const int32_t *copies, *count;  // [experts, most]: the group with each copy; [experts]: how many copies there are
  int64_t most;
  int64_t *rows_routed, *reads;  // [experts], counted up
};

// Python fills it: see _Step in exchange.py.
struct ExchangeStep {
  const void *x, *residual;
  void* out;
  int64_t x_stride, rows, turn;  // the copy that takes an expert's first row
  int64_t patience;              // nanoseconds to wait for an answer
  int32_t* ids;                  // [rows, top_k]
  float* weights;                // [rows, top_k]
  int32_t* pairs_sent;           // [groups]: pairs in the message that is under way or answered; 0: there is none
  int64_t* waited;               // [groups], nanoseconds, counted up
  int64_t* longest;              // nanoseconds of the longest wait for one answer; grows
};

// A decoder layer. Python fills it: see _FarLayer in exchange.py.
struct FarLayer {
  const AttentionWeights* attention;
  const ExchangeLayer* moe;      // null: the layer is dense
  const Linear *gate_up, *down;  // of the dense MLP
  void* cache;
  int64_t turn;  // as ExchangeStep has it
};

// Where layers are computed one after another. Python fills it: see _FarStep in exchange.py.
struct FarStep {
  const AttentionRows* rows;
  DecoderRows to;            // x and `other` have changed places after every layer
  const int32_t* wanted[2];  // whoever calls is wanted as soon as one of them is not 0
  int64_t budget;            // nanoseconds after which it has its turn in any case
  int64_t at;                // out: the layer that was come to
};

// What one group computes of a layer; as GroupShare in row_split.py.
struct Share {
  std::vector<int32_t> experts, offsets, rows;  // each pair's row among those that are sent
  std::vector<int32_t> sent;                    // which of the step's rows those are; empty: all of them
  std::vector<int64_t> pairs;                   // each pair's place in [rows, top_k]
};

class Exchange {
 public:
  // kGivenUp: before any row of a MoE layer was sent; what goes into it is in `h`, and its residual in x.
  enum Result : int { kWhole = 0, kOutOfMemory = 1, kOutOfCache = 2, kNotSent = -1, kNotAnswered = -2, kGivenUp = -3 };

  Exchange(Context* context, End* const* ends, int64_t groups);

  Result layer(const ExchangeLayer& layer, const ExchangeStep& step);
  // `step` has no x, residual, out and turn. Stops at the first MoE layer that is not kWhole, with its attention done.
  Result layers(const FarLayer* layers, int64_t count, ExchangeStep step, FarStep* far);

 private:
  void split(const ExchangeLayer& layer, const int32_t* ids, int64_t rows, int64_t turn);
  bool send(const ExchangeLayer& layer, const ExchangeStep& step);
  bool receive(const ExchangeLayer& layer, const ExchangeStep& step);
  void count(const ExchangeLayer& layer, const ExchangeStep& step) const;

  Context* context_;
  std::vector<End*> ends_;
  std::vector<Share> shares_;  // by group
  std::vector<int64_t> places_, order_;
  std::vector<int32_t> row_number_;
  std::vector<const void*> outputs_;  // of each pair
};

}  // namespace iso

#endif
