// When an expert group computes, and which layer: the gather window, as a pure function of who is where.
//
// Shards go round the same layers, step after step. The window lets those that are behind catch up with those ahead, so
// that busy shards fall into step, and then lets a layer's messages come together. Nobody is held longer than the
// window, and a shard that is silent for a window is waited for no more until it has sent a message.
#pragma once

#include <cstdint>

namespace iso {

struct Seat {       // one link
  int32_t pending;  // a message is there
  int32_t in_step;
  int64_t layer;  // of the message, or of the one that is expected next; not negative
  int64_t since;  // when the message came, or when the last one was answered
};

struct Choice {
  int64_t layer;  // to compute now, or -1
  int64_t until;  // when to choose again unless something comes
};

// Layers run from `first` to `end` - 1; times in one unit. `until` is INT64_MAX where nothing is pending.
inline Choice choose(const Seat* seats, int64_t count, int64_t first, int64_t end, int64_t window, int64_t now) {
  const int64_t round = end - first;
  const auto counts = [&](const Seat& s) { return s.pending != 0 || (s.in_step != 0 && now - s.since < window); };
  const Seat* oldest = nullptr;
  for (const Seat* s = seats; s < seats + count; ++s) {
    if (s->pending != 0 && (oldest == nullptr || s->since < oldest->since)) oldest = s;
  }
  if (oldest == nullptr) return {-1, INT64_MAX};
  if (now - oldest->since >= window) return {oldest->layer, 0};

  // Seats stand on a ring of layers. The rear is the one from which the others are reached soonest: the one after the
  // widest gap.
  const Seat* rear = nullptr;
  int64_t widest = -1;
  for (const Seat* s = seats; s < seats + count; ++s) {
    if (!counts(*s)) continue;
    int64_t gap = round;  // from the nearest seat behind
    for (const Seat* other = seats; other < seats + count; ++other) {
      const int64_t behind = ((s->layer - other->layer) % round + round) % round;
      if (counts(*other) && behind > 0 && behind < gap) gap = behind;
    }
    if (gap > widest) widest = gap, rear = s;
  }
  int64_t until = oldest->since + window;
  bool here = false, missing = false;
  for (const Seat* s = seats; s < seats + count; ++s) {
    if (!counts(*s)) continue;
    if (s->layer == rear->layer) (s->pending != 0 ? here : missing) = true;
    if (s->pending == 0 && s->since + window < until) until = s->since + window;
  }
  if (here && !missing) return {rear->layer, 0};
  return {-1, until};
}

}  // namespace iso
