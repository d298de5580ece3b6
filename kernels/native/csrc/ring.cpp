#include "ring.h"

#if defined(__linux__)

#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "signals.h"

namespace iso {
namespace {

// One thread that sleeps until a peer's socket is closed, by the peer or by the system.
class Watcher {
 public:
  static Watcher& instance() {
    static auto* const watcher = new Watcher();  // never destroyed: its thread may outlive everything
    return *watcher;
  }

  uint64_t add(End* end, int socket) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t key = ++last_;
    epoll_event event{};
    event.events = EPOLLRDHUP | EPOLLONESHOT;  // EPOLLHUP and EPOLLERR come unasked
    event.data.u64 = key;
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, socket, &event) != 0) throw std::system_error(errno, std::generic_category());
    ends_[key] = end;
    return key;
  }

  // After this the end is touched no more.
  void remove(uint64_t key, int socket) {
    const std::lock_guard<std::mutex> lock(mutex_);
    epoll_ctl(epoll_, EPOLL_CTL_DEL, socket, nullptr);
    ends_.erase(key);
  }

 private:
  Watcher() : epoll_(epoll_create1(EPOLL_CLOEXEC)) {
    if (epoll_ < 0) throw std::system_error(errno, std::generic_category());
    try {
      const SignalsBlocked blocked;
      std::thread([this] { run(); }).detach();
    } catch (...) {
      close(epoll_);
      throw;
    }
  }

  void run() {
    epoll_event events[16];
    for (;;) {
      const int count = epoll_wait(epoll_, events, 16, -1);
      const std::lock_guard<std::mutex> lock(mutex_);
      for (int i = 0; i < count; ++i) {
        const auto found = ends_.find(events[i].data.u64);
        if (found == ends_.end()) continue;
        found->second->mark_lost();
      }
    }
  }

  int epoll_;
  std::mutex mutex_;
  std::map<uint64_t, End*> ends_;
  uint64_t last_ = 0;
};

}  // namespace

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

void Patience::pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Between processes, so without FUTEX_PRIVATE_FLAG.
void Bell::ring() {
  count.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) > 0)
    syscall(SYS_futex, &count, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

void Bell::sleep(uint32_t seen, int64_t until) {
  timespec deadline{static_cast<time_t>(until / 1000000000), static_cast<long>(until % 1000000000)};
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, &count, FUTEX_WAIT_BITSET, seen, until == kNever ? nullptr : &deadline, nullptr,
          FUTEX_BITSET_MATCH_ANY);
  sleepers.fetch_sub(1, std::memory_order_relaxed);
}

// --- one end
// -------------------------------------------------------------------------------------------------

End::End(Header* at, Bell* own_bell, Bell* peers_bell, bool shard, int socket)
    : header(at),
      own(own_bell),
      peer_bell(peers_bell),
      shard_(shard),
      socket_(socket),
      watch_(Watcher::instance().add(this, socket)) {}

End::~End() {
  Watcher::instance().remove(watch_, socket_);
  (shard_ ? header->shard_closed : header->group_closed).store(1, std::memory_order_seq_cst);
  if (shard_) header->in_step.store(0, std::memory_order_relaxed);
  peer_bell->ring();
  close(socket_);
}

Outcome End::peer() const {
  if ((shard_ ? header->group_closed : header->shard_closed).load(std::memory_order_acquire) != 0) return kClosed;
  return lost_.load(std::memory_order_acquire) ? kLost : kReady;
}

void End::mark_lost() {
  lost_.store(true, std::memory_order_seq_cst);
  own->ring();
}

Outcome End::await(int64_t until, bool (End::*ready)() const) {
  Outcome seen = kReady;
  const bool came = wait_on(*own, patience, until, [&] { return (this->*ready)() || (seen = peer()) != kReady; });
  if ((this->*ready)()) return kReady;  // what the peer finished counts, even if it is gone by now
  return came ? seen : kTimedOut;
}

Outcome End::send(const Request& request, const int32_t* experts, const int32_t* offsets, const int32_t* rows,
                  const uint8_t* x, int64_t x_stride, const int32_t* taken) {
  if (const Outcome gone = peer(); gone != kReady) return gone;
  const Layout at = Layout::of(request.active, request.pairs, request.rows * request.row_bytes);
  const auto copy = [&](int64_t offset, const void* from, int64_t bytes) {
    if (bytes > 0) std::memcpy(header->at(offset), from, static_cast<size_t>(bytes));
  };
  copy(at.experts, experts, request.active * 4);
  copy(at.offsets, offsets, (request.active + 1) * 4);
  copy(at.rows, rows, request.pairs * 4);
  if (taken == nullptr && x_stride == request.row_bytes) {
    copy(at.x, x, request.rows * request.row_bytes);
  } else {
    for (int64_t r = 0; r < request.rows; ++r)
      copy(at.x + r * request.row_bytes, x + (taken == nullptr ? r : taken[r]) * x_stride, request.row_bytes);
  }
  header->request = request;
  header->in_step.store(1, std::memory_order_relaxed);
  header->sent.store(++sequence, std::memory_order_seq_cst);
  peer_bell->ring();
  return kReady;
}

Outcome End::await_reply(int64_t until) {
  const Outcome outcome = await(until, &End::answered);
  if (outcome == kTimedOut)
    lost_.store(true, std::memory_order_release);  // a late answer would be taken for a later one's
  return outcome;
}

void End::step(bool inside) {
  const bool before = header->in_step.exchange(inside ? 1 : 0, std::memory_order_seq_cst) != 0;
  if (before && !inside) peer_bell->ring();  // others wait for this shard no more
}

Outcome End::await_request(int64_t until) { return await(until, &End::pending); }

const char* End::read(int64_t mapped, Message* out) {
  const uint64_t sent = header->sent.load(std::memory_order_acquire);
  const Request request = header->request;  // a copy: what is checked is what is used
  if (sent != sequence + 1) return "messages overtook each other";
  const auto fits = [&](int64_t count, int64_t size) { return count >= 0 && size > 0 && count <= mapped / size; };
  if (!fits(request.active, 4) || !fits(request.pairs, 4) || !fits(request.rows, request.row_bytes) ||
      !fits(request.pairs, request.row_bytes)) {
    return "a message's numbers are out of range";
  }
  const Layout at = Layout::of(request.active, request.pairs, request.rows * request.row_bytes);
  const int64_t room = std::max(request.pairs * request.row_bytes, kLeastReply);
  if (request.reply_at < at.end || request.reply_at > mapped - room || request.reply_at % kAlign != 0)
    return "a message does not fit its segment";
  const auto numbers = [&](int64_t offset) { return reinterpret_cast<const int32_t*>(header->at(offset)); };
  *out = {sent,
          request,
          numbers(at.experts),
          numbers(at.offsets),
          numbers(at.rows),
          header->at(at.x),
          header->at(request.reply_at),
          room};
  sequence = sent;
  return nullptr;
}

void End::reply(uint64_t answered, ReplyKind kind, int64_t bytes) {
  header->reply_kind = kind;
  header->reply_bytes = bytes;
  header->answered.store(answered, std::memory_order_seq_cst);
  peer_bell->ring();
}

}  // namespace iso

// --- for Python
// -------------------------------------------------------------------------------------------------

using namespace iso;

#define ISO_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
int64_t deadline(double seconds) { return seconds < 0 ? kNever : now_ns() + static_cast<int64_t>(seconds * 1e9); }
}  // namespace

// Before anybody else has the segment, which is zeroed memory.
ISO_EXPORT void iso_segment_begin(Header* header, int64_t bytes) {
  header->magic = kMagic;
  header->bytes.store(bytes, std::memory_order_release);
}

// `own`, `peer`: bells; null: the segment's own. Takes the socket over; null when the segment is none, or no descriptor
// or memory is left.
ISO_EXPORT End* iso_end_open(Header* header, Bell* own, Bell* peer, int shard, int socket) {
  if (header->magic != kMagic) return nullptr;
  Bell* const shards = &header->shard_bell;
  try {
    return new End(header, own == nullptr ? shards : own, peer == nullptr ? shards : peer, shard != 0, socket);
  } catch (const std::exception&) {
    return nullptr;
  }
}
ISO_EXPORT void iso_end_close(End* end) { delete end; }

// Ends every wait of this end and those to come, from any thread.
ISO_EXPORT void iso_end_abandon(End* end) { end->mark_lost(); }

// The segment is mapped anew at `header`, with `bytes`. The first mapping stays: bells are rung there.
ISO_EXPORT void iso_end_move(End* end, Header* header, int64_t bytes, int shard) {
  end->header = header;
  if (shard != 0) header->bytes.store(bytes, std::memory_order_release);
}
ISO_EXPORT int64_t iso_end_bytes(const End* end) { return end->header->bytes.load(std::memory_order_acquire); }

// 0: sent. Negative: -Outcome. Positive: the segment needs so many bytes.
ISO_EXPORT int64_t iso_end_send(End* end, int64_t layer, int64_t version, const int32_t* experts, int64_t active,
                                const int32_t* offsets, const int32_t* rows, int64_t pairs, const uint8_t* x,
                                int64_t x_stride, int64_t x_rows, int64_t row_bytes, int dtype) {
  const int64_t reply_at = Layout::of(active, pairs, x_rows * row_bytes).end;
  const int64_t needed = reply_at + std::max(pairs * row_bytes, kLeastReply);
  if (needed > iso_end_bytes(end)) return needed;
  return -end->send(Request{layer, version, active, pairs, x_rows, row_bytes, dtype, reply_at}, experts, offsets, rows,
                    x, x_stride);
}

// → kind, where, bytes of the reply.
ISO_EXPORT int iso_end_receive(End* end, double seconds, int64_t* out) {
  const Outcome outcome = end->await_reply(deadline(seconds));
  const Header& header = *end->header;
  out[0] = header.reply_kind, out[1] = header.request.reply_at, out[2] = header.reply_bytes;
  return outcome;
}
ISO_EXPORT void iso_end_step(End* end, int inside) { end->step(inside != 0); }

ISO_EXPORT int iso_end_await_request(End* end, double seconds) { return end->await_request(deadline(seconds)); }

// → sequence, layer, version, active, pairs, rows, row bytes, dtype, where x begins. Returns null, or what is wrong.
ISO_EXPORT const char* iso_end_read(End* end, int64_t mapped, int64_t* out) {
  Message m;
  if (const char* wrong = end->read(mapped, &m)) return wrong;
  const Request& r = m.request;
  const int64_t fields[] = {
      static_cast<int64_t>(m.sequence), r.layer, r.version, r.active, r.pairs, r.rows, r.row_bytes, r.dtype,
      m.x - end->header->at(0)};
  std::copy(std::begin(fields), std::end(fields), out);
  return nullptr;
}

// False where the reply does not fit (no such message asked for it) or the peer is gone.
ISO_EXPORT int iso_end_reply(End* end, int64_t sequence, int kind, const uint8_t* data, int64_t bytes) {
  const Request& request = end->header->request;
  if (end->peer() != kReady || bytes > std::max(request.pairs * request.row_bytes, kLeastReply)) return 0;
  if (bytes > 0) std::memcpy(end->header->at(request.reply_at), data, static_cast<size_t>(bytes));
  end->reply(static_cast<uint64_t>(sequence), static_cast<ReplyKind>(kind), bytes);
  return 1;
}

#endif
