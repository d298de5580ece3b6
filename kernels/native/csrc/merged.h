// What a group computes with, and several messages of one layer as one call.
#pragma once

#include "group_link.h"

#if defined(__linux__)

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

struct Context;  // bind.cpp's: opaque here

namespace iso {

struct Bank;

// Held while experts are computed, and while one is named or unnamed. Fair: whoever waits gets in before the holder can
// come back.
class Gate {
 public:
  void enter() {
    turnstile_.lock();
    inside_.lock();
    turnstile_.unlock();
  }
  void leave() { inside_.unlock(); }

 private:
  std::mutex turnstile_, inside_;
};

// What the group holds and computes with; the arrays belong to the caller.
struct Experts {
  Context* context;
  const Bank* bank;
  Gate* gate;
  const int32_t* slot_of;  // [layers, experts]: slot, or -1
  int64_t* rows_served;    // [layers, experts]
  int64_t layers, experts, first_layer;
  int64_t row_bytes;
  int32_t dtype;
};

// Several messages of one layer as one call: their pairs expert by expert, message by message. Rows are copied in and
// outputs out, which is little beside the weights that are read once instead of several times.
class Merged {
 public:
  void build(const std::vector<GroupLink*>& links, const Experts& experts) {
    runs_.clear();
    int64_t rows = 0;
    pairs = 0;
    for (size_t m = 0; m < links.size(); ++m) {
      const Message& message = links[m]->message;
      const int32_t* slots = experts.slot_of + message.request.layer * experts.experts;
      for (int64_t a = 0; a < message.request.active; ++a) {
        runs_.push_back(
            Run{slots[message.experts[a]], m, message.offsets[a], message.offsets[a + 1], static_cast<int32_t>(rows)});
      }
      rows += message.request.rows;
      pairs += message.request.pairs;
    }
    std::stable_sort(runs_.begin(), runs_.end(), [](const Run& a, const Run& b) { return a.slot < b.slot; });
    x.resize(static_cast<size_t>(rows * experts.row_bytes));
    y.resize(static_cast<size_t>(pairs * experts.row_bytes));
    uint8_t* to = x.data();
    for (const GroupLink* link : links) {
      const auto bytes = static_cast<size_t>(link->message.request.rows * experts.row_bytes);
      if (bytes > 0) std::memcpy(to, link->message.x, bytes);
      to += bytes;
    }
    slots.clear(), offsets.assign(1, 0), row_of.clear();
    for (const Run& run : runs_) {
      if (slots.empty() || slots.back() != run.slot) {
        slots.push_back(run.slot);
        offsets.push_back(offsets.back());
      }
      for (int32_t p = run.begin; p < run.end; ++p)
        row_of.push_back(run.first_row + links[run.message]->message.rows[p]);
      offsets.back() += run.end - run.begin;
    }
  }

  void scatter(const std::vector<GroupLink*>& links, int64_t row_bytes) const {
    const uint8_t* from = y.data();
    for (const Run& run : runs_) {
      const auto bytes = static_cast<size_t>((run.end - run.begin) * row_bytes);
      if (bytes > 0) std::memcpy(links[run.message]->message.reply + run.begin * row_bytes, from, bytes);
      from += bytes;
    }
  }

  std::vector<uint8_t> x, y;
  std::vector<int32_t> slots, offsets, row_of;
  int64_t pairs = 0;

 private:
  struct Run {  // one message's pairs of one expert
    int32_t slot;
    size_t message;
    int32_t begin, end, first_row;
  };
  std::vector<Run> runs_;
};

}  // namespace iso

#endif
