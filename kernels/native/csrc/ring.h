// One link between a shard and an expert group in memory that both have mapped. Python sees the `iso_end_` functions of
// ring.cpp.
//
// A segment is a Header page, then the body of the message under way: experts int32[active], offsets int32[active + 1],
// rows int32[pairs], zeros up to kAlign, the rows' bytes; and, at `reply_at`, the outputs' bytes or a text. The shard
// lays both out, so only the shard grows a segment. One message is under way at a time: the request and the reply are
// one slot each.
//
// Whoever waits sleeps on a bell of its own: a shard's lies in its segment, a group's in a page that its shards have
// mapped too, so that one group waits for many shards at once. A thread per process watches the sockets over which
// links were made: the system closes a dead process's socket, and that rings the survivor's own bell.
#pragma once

#if defined(__linux__)

#include <atomic>
#include <cstdint>

namespace iso {

constexpr uint32_t kMagic = 0x4b4c5349;  // "ISLK"
constexpr int64_t kHeaderBytes = 4096;   // the body begins here, on a page of its own
constexpr int64_t kAlign = 64;
constexpr int64_t kLeastReply = 4096;  // room for a refusal's text
constexpr int64_t kNever = INT64_MAX;

enum ReplyKind : int32_t { kOutputs = 2, kNotHeld = 3, kFailed = 4 };
enum Outcome : int { kReady = 0, kTimedOut = 1, kLost = 2, kClosed = 3 };

int64_t now_ns();

struct alignas(64) Bell {
  std::atomic<uint32_t> count, sleepers;

  void ring();
  void sleep(uint32_t seen,
             int64_t until);  // until the count is no longer `seen`, `until` in now_ns() has come, or for no reason
};

// How long to look before sleeping: what helped the last times. Several processes share the cores, so never for long.
class Patience {
 public:
  template <class Ready>
  bool spin(Ready ready) {
    const int64_t until = now_ns() + budget_;
    for (;;) {
      for (int i = 0; i < 8; ++i) {
        if (ready()) {
          budget_ = budget_ * 2 < kMost ? budget_ * 2 : kMost;
          return true;
        }
        pause();
      }
      if (now_ns() >= until) break;
    }
    budget_ = budget_ / 2 > kLeast ? budget_ / 2 : kLeast;
    return false;
  }

 private:
  static constexpr int64_t kLeast = 500, kMost = 20000;  // nanoseconds
  static void pause();

  int64_t budget_ = 4000;
};

// True as soon as `ready` is, false at `until`. Whatever makes it ready must ring the bell.
template <class Ready>
bool wait_on(Bell& bell, Patience& patience, int64_t until, Ready ready) {
  if (ready() || patience.spin(ready)) return true;
  for (;;) {
    const uint32_t seen = bell.count.load(std::memory_order_acquire);
    if (ready()) return true;
    if (now_ns() >= until) return false;
    bell.sleep(seen, until);
  }
}

struct Request {
  int64_t layer, version, active, pairs, rows, row_bytes;
  int32_t dtype;     // the caller's code for the rows' type
  int64_t reply_at;  // from the segment's start
};

struct Header {
  uint32_t magic;
  std::atomic<int64_t> bytes;              // of the segment; grows
  alignas(64) std::atomic<uint64_t> sent;  // the sequence number of the last message
  std::atomic<uint32_t> in_step, shard_closed;
  Request request;
  alignas(64) std::atomic<uint64_t> answered;
  std::atomic<uint32_t> group_closed;
  int32_t reply_kind;
  int64_t reply_bytes;
  Bell shard_bell;

  uint8_t* at(int64_t offset) { return reinterpret_cast<uint8_t*>(this) + offset; }
};
static_assert(sizeof(Header) <= kHeaderBytes && std::atomic<uint64_t>::is_always_lock_free);

// Where the parts of a request's body begin, from the segment's start.
struct Layout {
  int64_t experts, offsets, rows, x, end;

  static Layout of(int64_t active, int64_t pairs, int64_t x_bytes) {
    const int64_t offsets = kHeaderBytes + active * 4, rows = offsets + (active + 1) * 4,
                  numbers_end = rows + pairs * 4;
    const int64_t x = (numbers_end + kAlign - 1) / kAlign * kAlign;
    return {kHeaderBytes, offsets, rows, x, (x + x_bytes + kAlign - 1) / kAlign * kAlign};
  }
};

// A message as the group reads it where it lies.
struct Message {
  uint64_t sequence;
  Request request;
  const int32_t *experts, *offsets, *rows;
  const uint8_t* x;
  uint8_t* reply;
  int64_t reply_room;
};

// One process's end of a link. The mappings are the caller's; the socket is taken over.
class End {
 public:
  End(Header* header, Bell* own, Bell* peer, bool shard, int socket);
  ~End();  // tells the peer
  End(const End&) = delete;
  End& operator=(const End&) = delete;

  // kReady while the peer is there.
  Outcome peer() const;
  void mark_lost();  // by the watcher, or after a timeout

  // --- the shard's side ---
  // `taken`: which rows of x the message has; null: the first ones, in order.
  Outcome send(const Request& request, const int32_t* experts, const int32_t* offsets, const int32_t* rows,
               const uint8_t* x, int64_t x_stride, const int32_t* taken = nullptr);
  Outcome await_reply(int64_t until);
  // Whether there is one at `until`. Where there is none, it may be waited for again.
  bool reply_comes(int64_t until) { return await(until, &End::answered) == kReady; }
  void step(bool inside);

  // --- the group's side ---
  bool pending() const { return header->sent.load(std::memory_order_acquire) != sequence; }
  Outcome await_request(int64_t until);
  // Null where the request doesn't fit the `mapped` bytes or its own numbers: the peer broke the protocol.
  const char* read(int64_t mapped, Message* out);
  void reply(uint64_t answered, ReplyKind kind, int64_t bytes);

  Header* header;
  Bell *own, *peer_bell;
  uint64_t sequence = 0;  // last sent, or last read
  Patience patience;

 private:
  Outcome await(int64_t until, bool (End::*ready)() const);
  bool answered() const { return header->answered.load(std::memory_order_acquire) == sequence; }

  bool shard_;
  int socket_;
  std::atomic<bool> lost_{false};
  uint64_t watch_;  // the last of all: from here on the watcher may mark this end as lost
};

}  // namespace iso

#endif
