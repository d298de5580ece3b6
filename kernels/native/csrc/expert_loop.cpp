// The C functions by which Python runs an expert group's loop.
#include "expert_loop.h"

#if defined(__linux__)

#define ISO_EXPORT extern "C" __attribute__((visibility("default")))

using namespace iso;

ISO_EXPORT Gate* iso_gate_create() { return new (std::nothrow) Gate(); }
ISO_EXPORT void iso_gate_destroy(Gate* gate) { delete gate; }
ISO_EXPORT void iso_gate_enter(Gate* gate) { gate->enter(); }
ISO_EXPORT void iso_gate_leave(Gate* gate) { gate->leave(); }

ISO_EXPORT ExpertLoop* iso_loop_create(Context* context, const Bank* bank, Gate* gate, const int32_t* slot_of,
                                       int64_t* rows_served, int64_t layers, int64_t experts, int64_t first_layer,
                                       int64_t row_bytes, int dtype, double window) {
  try {
    return new ExpertLoop(
        Experts{context, bank, gate, slot_of, rows_served, layers, experts, first_layer, row_bytes, dtype}, window);
  } catch (const std::exception&) {
    return nullptr;
  }
}
ISO_EXPORT void iso_loop_stop(ExpertLoop* loop) { loop->stop(); }
ISO_EXPORT void iso_loop_destroy(ExpertLoop* loop) { delete loop; }
ISO_EXPORT void iso_loop_prod(ExpertLoop* loop) { loop->prod(); }
ISO_EXPORT int iso_loop_bell(const ExpertLoop* loop) { return loop->bell_file(); }

// The link's number, or -1: the segment can't be mapped or is none.
ISO_EXPORT int64_t iso_loop_attach(ExpertLoop* loop, int segment, int socket) {
  try {
    return loop->attach(segment, socket);
  } catch (const std::exception&) {
    return -1;
  }
}
ISO_EXPORT void iso_loop_detach(ExpertLoop* loop, int64_t link) { loop->detach(link); }

// Waits for something to tell: link and kind in `out`, words in `text`. 0: the loop ends.
ISO_EXPORT int iso_loop_event(ExpertLoop* loop, int64_t* out, char* text, int64_t size) {
  Event event;
  if (!loop->next_event(&event)) return 0;
  out[0] = event.link, out[1] = event.kind;
  std::snprintf(text, static_cast<size_t>(size), "%s", event.text.c_str());
  return 1;
}
ISO_EXPORT void iso_loop_counts(const ExpertLoop* loop, int64_t* out) {
  for (int i = 0; i < kCounts; ++i) out[i] = loop->count(i);
}

// For tests: seats as rows of pending, in step, layer, since.
ISO_EXPORT void iso_gather_choose(const int64_t* seats, int64_t count, int64_t first, int64_t end, int64_t window,
                                  int64_t now, int64_t* out) {
  std::vector<Seat> all;
  for (const int64_t* s = seats; s < seats + 4 * count; s += 4) {
    all.push_back(Seat{static_cast<int32_t>(s[0]), static_cast<int32_t>(s[1]), s[2], s[3]});
  }
  const Choice choice = choose(all.data(), count, first, end, window, now);
  out[0] = choice.layer, out[1] = choice.until;
}

#endif
