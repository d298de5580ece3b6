// An expert group's loop over shared-memory links: one thread that waits for messages, gathers those of one layer,
// computes and replies. No Python between receive and reply.
#pragma once

#include "ring.h"

#if defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "bell_page.h"
#include "gather.h"
#include "group_link.h"
#include "merged.h"
#include "signals.h"

extern "C" int iso_experts(Context* context, const iso::Bank* bank, const void* x, int64_t x_stride, int64_t x_rows,
                           const int32_t* rows, int64_t pairs, const int32_t* slots, const int32_t* offsets,
                           int64_t active, void* out);

namespace iso {

// In the order of kernels/native/ring.py's LoopCounts.
enum Count {
  kMessages,
  kComputations,
  kGathered,
  kPairs,
  kBusyNs,
  kHeldNs,
  kRefused,
  kBeats,
  kBeganNs,
  kLongestNs,
  kThread,
  kCounts
};

struct Event {
  enum Kind : int64_t { closed = 1, lost = 2, broken = 3, refused = 4 };
  int64_t link, kind;
  std::string text;
};

constexpr int64_t kPlenty = 32;  // pairs per expert from which company no longer makes a computation cheaper
constexpr size_t kMostEvents = 256;

class ExpertLoop {
 public:
  // `window`: how long a message is held for others, as a multiple of the time that a layer takes a shard (here and at
  // home).
  ExpertLoop(const Experts& experts, double window) : experts_(experts), window_(window) {
    const SignalsBlocked blocked;
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "expert loop");
  }

  // After `stop`, and when nobody is inside `next_event` any more.
  ~ExpertLoop() { stop(); }

  // Ends the thread after the computation under way, and every link.
  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    bell_->ring();
    told_.notify_all();
    if (thread_.joinable()) thread_.join();
    links_.clear();
    incoming_.clear();
  }

  int bell_file() const { return page_.file(); }

  // Takes both descriptors over. Throws std::bad_alloc.
  int64_t attach(int segment, int socket) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Room first, for as many links to leave too: what fails after a link is made would close descriptors twice.
    incoming_.reserve(incoming_.size() + 1);
    leaving_.reserve(static_cast<size_t>(last_id_) + 1);
    incoming_.push_back(std::make_unique<GroupLink>(last_id_ + 1, segment, socket, bell_));
    bell_->ring();
    return ++last_id_;
  }

  void detach(int64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // One that was never made, or leaves already: there is room for each once.
    if (id < 1 || id > last_id_ || std::find(leaving_.begin(), leaving_.end(), id) != leaving_.end()) return;
    leaving_.push_back(id);
    bell_->ring();
  }

  // False once the loop ends.
  bool next_event(Event* out) {
    std::unique_lock<std::mutex> lock(mutex_);
    told_.wait(lock, [&] { return stop_ || !events_.empty(); });
    if (events_.empty()) return false;
    *out = std::move(events_.front());
    events_.pop_front();
    return true;
  }

  // Wakes the thread where it sleeps: it beats once more.
  void prod() { bell_->ring(); }

  int64_t count(int which) const { return counts_[static_cast<size_t>(which)].load(std::memory_order_relaxed); }

 private:
  void run() {
    set(kThread, syscall(SYS_gettid));
    for (;;) {
      const uint32_t seen = bell_->count.load(std::memory_order_seq_cst);  // whatever changes from here on rings
      add(kBeats, 1);
      if (!take_commands()) return;
      const int64_t now = now_ns();
      look(now);
      const Choice choice = decide(now);
      if (choice.layer >= 0) {
        serve(choice.layer);
        continue;
      }
      if (!patience_.spin([&] { return bell_->count.load(std::memory_order_acquire) != seen; }))
        bell_->sleep(seen, choice.until);
      if (choice.until != kNever) add(kHeldNs, now_ns() - now);
    }
  }

  bool take_commands() {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {  // the lists with a place for each link grow here alone
      const size_t links = links_.size() + incoming_.size();
      links_.reserve(links), batch_.reserve(links), seats_.reserve(links);
    } catch (const std::bad_alloc&) {
      return !stop_;  // whoever comes or leaves waits for the next turn
    }
    for (auto& link : incoming_) links_.push_back(std::move(link));
    incoming_.clear();
    for (const int64_t id : leaving_) {
      links_.erase(std::remove_if(links_.begin(), links_.end(), [&](const auto& l) { return l->id == id; }),
                   links_.end());
    }
    leaving_.clear();
    return !stop_;
  }

  // Takes new messages and drops links that ended.
  void look(int64_t now) {
    for (auto& link : links_) {
      const Outcome peer = link->end->peer();
      if (peer != kReady) {
        tell(
            Event{link->id, peer == kClosed ? Event::closed : Event::lost, peer == kClosed ? "" : "the process ended"});
        link.reset();
        continue;
      }
      if (link->pending || !link->end->pending()) continue;
      try {
        if (const char* wrong = link->take(now)) {
          tell(Event{link->id, Event::broken, std::string("protocol error: ") + wrong});
          link.reset();
          continue;
        }
      } catch (const std::bad_alloc&) {
        tell(Event{link->id, Event::broken, "its segment could not be mapped"});
        link.reset();
        continue;
      }
      if (link->message.request.layer < 0) {  // `choose` takes it for no layer, and would have everybody wait for it
        refuse(*link);
        continue;
      }
      // Time at home between two layers of a step. A pause between steps says nothing about it.
      if (link->message.request.layer > link->answered_layer && link->answered_layer >= 0)
        average(&home_ns_, now - link->answered);
    }
    links_.erase(std::remove(links_.begin(), links_.end(), nullptr), links_.end());
  }

  Choice decide(int64_t now) {
    seats_.clear();
    for (const auto& link : links_) {
      const bool in_step = link->end->header->in_step.load(std::memory_order_relaxed) != 0;
      const int64_t next = link->answered_layer + 1 < experts_.layers ? link->answered_layer + 1 : experts_.first_layer;
      const bool plenty = link->pending && link->per_expert() >= kPlenty;
      seats_.push_back(
          link->pending ? Seat{1, in_step, link->message.request.layer, plenty ? 0 : link->came}
                        : Seat{0, in_step && link->answered > 0, std::max(next, experts_.first_layer), link->answered});
    }
    const auto window = static_cast<int64_t>(window_ * static_cast<double>(home_ns_ + service_ns_));
    return choose(seats_.data(), static_cast<int64_t>(seats_.size()), experts_.first_layer, experts_.layers, window,
                  now);
  }

  void serve(int64_t layer) {
    const int64_t begin = now_ns();
    set(kBeganNs, begin);
    batch_.clear();
    for (const auto& link : links_) {
      if (link->pending && link->message.request.layer == layer) batch_.push_back(link.get());
    }
    experts_.gate->enter();
    batch_.erase(std::remove_if(batch_.begin(), batch_.end(), [&](GroupLink* link) { return refuse(*link); }),
                 batch_.end());
    const int code = compute();
    if (code == 0) count_rows(layer);
    experts_.gate->leave();
    const int64_t took = now_ns() - begin;
    set(kBeganNs, 0);
    remember(took);
    if (batch_.empty()) return;
    average(&service_ns_, took);
    // Counted before it is answered, so that a shard that has its answer finds it counted.
    add(kBusyNs, took);
    add(kComputations, 1);
    if (code != 0) {
      const char* const why =
          code == 1 ? "MemoryError: no memory to compute in" : "RuntimeError: an expert's slot is empty";
      for (GroupLink* link : batch_) say(*link, kFailed, why);
      return;
    }
    add(kMessages, static_cast<int64_t>(batch_.size()));
    if (batch_.size() > 1) add(kGathered, static_cast<int64_t>(batch_.size()));
    for (GroupLink* link : batch_) {
      add(kPairs, link->message.request.pairs);
      link->answer(kOutputs, link->message.request.pairs * experts_.row_bytes);
    }
  }

  // Answers a message that cannot be computed.
  bool refuse(GroupLink& link) {
    const Request& r = link.message.request;
    char text[256];
    if (r.dtype != experts_.dtype || r.row_bytes != experts_.row_bytes) {
      std::snprintf(text, sizeof text,
                    "ValueError: rows of %lld bytes (type %d) came; this group computes rows of %lld bytes (type %d)",
                    static_cast<long long>(r.row_bytes), r.dtype, static_cast<long long>(experts_.row_bytes),
                    experts_.dtype);
      return say(link, kFailed, text);
    }
    if (r.layer < 0 || r.layer >= experts_.layers) {
      std::snprintf(text, sizeof text, "IndexError: layer %lld is not in 0 … %lld", static_cast<long long>(r.layer),
                    static_cast<long long>(experts_.layers - 1));
      return say(link, kFailed, text);
    }
    std::string missing;
    for (int64_t a = 0; a < r.active; ++a) {
      const int32_t e = link.message.experts[a];
      if (e < 0 || e >= experts_.experts)
        return say(link, kFailed, "IndexError: expert " + std::to_string(e) + " does not exist");
      if (experts_.slot_of[r.layer * experts_.experts + e] < 0)
        missing += (missing.empty() ? "" : ", ") + std::to_string(e);
    }
    // Checked before messages are merged, since one that is wrong must fail alone.
    const int32_t* offsets = link.message.offsets;
    bool sound = offsets[0] == 0 && offsets[r.active] == r.pairs;
    for (int64_t a = 0; a < r.active; ++a) sound = sound && offsets[a] <= offsets[a + 1];
    for (int64_t p = 0; sound && p < r.pairs; ++p) sound = link.message.rows[p] >= 0 && link.message.rows[p] < r.rows;
    if (!sound) return say(link, kFailed, "IndexError: the message's rows or offsets are out of range");
    if (missing.empty()) return false;
    return say(link, kNotHeld,
               "ExpertNotHeldError: layer " + std::to_string(r.layer) + " experts [" + missing +
                   "] are not held (placement version " + std::to_string(r.version) + ")");
  }

  int compute() try {
    if (batch_.empty()) return 0;
    const int64_t width = experts_.row_bytes / (experts_.dtype == 0 ? 4 : 2);
    if (batch_.size() == 1) {
      const Message& m = batch_[0]->message;
      const int32_t* slot_of = experts_.slot_of + m.request.layer * experts_.experts;
      slots_.clear();
      for (int64_t a = 0; a < m.request.active; ++a) slots_.push_back(slot_of[m.experts[a]]);
      return iso_experts(experts_.context, experts_.bank, m.x, width, m.request.rows, m.rows, m.request.pairs,
                         slots_.data(), m.offsets, m.request.active, m.reply);
    }
    merged_.build(batch_, experts_);
    const int64_t rows = static_cast<int64_t>(merged_.x.size()) / experts_.row_bytes;
    const int code = iso_experts(experts_.context, experts_.bank, merged_.x.data(), width, rows, merged_.row_of.data(),
                                 merged_.pairs, merged_.slots.data(), merged_.offsets.data(),
                                 static_cast<int64_t>(merged_.slots.size()), merged_.y.data());
    if (code == 0) merged_.scatter(batch_, experts_.row_bytes);
    return code;
  } catch (const std::bad_alloc&) {
    return 1;
  }

  void count_rows(int64_t layer) {
    for (const GroupLink* link : batch_) {
      const Message& m = link->message;
      for (int64_t a = 0; a < m.request.active; ++a)
        experts_.rows_served[layer * experts_.experts + m.experts[a]] += m.offsets[a + 1] - m.offsets[a];
    }
  }

  bool say(GroupLink& link, ReplyKind kind, const std::string& text) {
    const auto bytes = std::min<int64_t>(static_cast<int64_t>(text.size()), link.message.reply_room);
    std::memcpy(link.message.reply, text.data(), static_cast<size_t>(bytes));
    add(kMessages, 1);
    add(kRefused, 1);
    link.answer(kind, bytes);
    tell(Event{link.id, Event::refused, text});
    return true;
  }

  void tell(Event event) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() < kMostEvents) events_.push_back(std::move(event));
    told_.notify_one();
  }

  void add(Count which, int64_t amount) { counts_[which].fetch_add(amount, std::memory_order_relaxed); }
  void set(Count which, int64_t value) { counts_[static_cast<size_t>(which)].store(value, std::memory_order_relaxed); }
  // How long computations take at the most: the longest of late ones but one, as `Lately` of actors/pulse.py has it. A
  // pause of the whole process is no measure of work.
  void remember(int64_t took) {
    int64_t longest = count(kLongestNs);
    if (pause_ns_ == 0) {
      longest = pause_ns_ = took;
    } else {
      longest -= longest / 1000, pause_ns_ -= pause_ns_ / 1000;
      longest = std::max(longest, std::min(took, pause_ns_));
      pause_ns_ = std::max(pause_ns_, took);
    }
    set(kLongestNs, longest);
  }
  static void average(int64_t* value, int64_t now) { *value = *value == 0 ? now : *value + (now - *value) / 8; }

  const Experts experts_;
  const double window_;
  const BellPage page_;
  Bell* const bell_ = page_.bell();

  // The loop's own.
  std::vector<std::unique_ptr<GroupLink>> links_;
  std::vector<GroupLink*> batch_;
  std::vector<Seat> seats_;
  std::vector<int32_t> slots_;
  Merged merged_;
  Patience patience_;
  int64_t home_ns_ = 0, service_ns_ = 0;
  int64_t pause_ns_ = 0;  // the longest computation of late, which may have been a pause

  std::array<std::atomic<int64_t>, kCounts> counts_{};

  std::mutex mutex_;  // of what follows
  std::condition_variable told_;
  std::vector<std::unique_ptr<GroupLink>> incoming_;
  std::vector<int64_t> leaving_;
  std::deque<Event> events_;
  int64_t last_id_ = 0;
  bool stop_ = false;

  std::thread thread_;
};

}  // namespace iso

#endif
