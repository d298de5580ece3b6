#include "pool.h"

#include <algorithm>
#include <chrono>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#include <sys/resource.h>
#endif

#include "signals.h"

namespace iso {
namespace {

using Clock = std::chrono::steady_clock;
// How long a thread spins before it sleeps: the longest is well over the time between two jobs of a layer.
constexpr std::chrono::microseconds kMostSpin{80}, kLeastSpin{2};
constexpr uint64_t kClosed = 0xffffffff;  // more items claimed than any job has

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Denormals are kept and rounding is to nearest while kernels run, whatever the calling thread (or the one that a
// worker inherited its state from) has set: otherwise bits would depend on which thread runs an item.
class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(0x1f80); }
  ~FloatMode() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#else
  FloatMode() {}
  ~FloatMode() {}
#endif
};

// Spins until `end`, giving the core away now and then, since several worker processes share the cores.
template <class F>
bool spin(Clock::time_point end, F ready) {
  for (int i = 1; !ready(); ++i) {
    pause();
    if (i % 8 == 0 && Clock::now() >= end) return ready();
    if (i % 128 == 0) std::this_thread::yield();
  }
  return true;
}

// How nice it is to give way: beside a thread that never pauses this leaves a tenth of a core. The most would leave a
// seventieth, and whoever waits for an item that was begun would wait long.
[[maybe_unused]] constexpr int kNiceness = 10;

void step_aside([[maybe_unused]] const char* name) {
#if defined(__linux__)  // which keeps a niceness for each thread
  pthread_setname_np(pthread_self(), name);
  setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + kNiceness);
#endif
}

}  // namespace

Pool::Pool(int threads, const char* aside) {
  const SignalsBlocked blocked;
  try {
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this, aside] {
        if (aside != nullptr) step_aside(aside);
        work();
      });
    }
  } catch (...) {  // the system has no more threads to give: those that there are must not outlive this
    end();
    throw;
  }
}

Pool::~Pool() { end(); }

void Pool::end() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(int64_t items, Body body, void* context) {
  constexpr int64_t kMostItems = 1u << 31;
  const FloatMode mode;
  if (items <= 1 || items > kMostItems || workers_.empty() || !busy_.try_lock()) {
    for (int64_t i = 0; i < items; ++i) body(context, i);
    return;
  }
  std::lock_guard<std::mutex> held(busy_, std::adopt_lock);
  const uint32_t total = static_cast<uint32_t>(items);
  // First an epoch with no items left: a late worker that still holds the last job's head must fail to claim before it
  // can see the new job's total, or it would claim an item of a job that has not begun.
  const uint32_t job = epoch() + 2;
  resting_.store(false, std::memory_order_relaxed);
  head_.store(static_cast<uint64_t>(job - 1) << 32 | kClosed, std::memory_order_seq_cst);
  body_.store(body, std::memory_order_release);
  context_.store(context, std::memory_order_release);
  total_.store(total, std::memory_order_release);
  done_.store(0, std::memory_order_release);
  head_.store(static_cast<uint64_t>(job) << 32, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (items > 2) {
      wake_.notify_all();
    } else {
      wake_.notify_one();
    }
  }
  drain(job);
  const auto finished = [&] { return done_.load(std::memory_order_seq_cst) == total; };
  if (!spin(Clock::now() + 4 * kMostSpin, finished)) {
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_.store(true, std::memory_order_seq_cst);
    finished_.wait(lock, finished);
    waiting_.store(false, std::memory_order_relaxed);
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pool::drain(uint32_t job) {
  uint64_t head = head_.load(std::memory_order_acquire);
  for (;;) {
    const Body body = body_.load(std::memory_order_acquire);
    void* const context = context_.load(std::memory_order_acquire);
    const uint32_t total = total_.load(std::memory_order_acquire);
    if (static_cast<uint32_t>(head >> 32) != job || static_cast<uint32_t>(head) >= total) return;
    // Success means that the job was still open, so the three fields above were its own: new ones are stored after it
    // is closed.
    if (!head_.compare_exchange_weak(head, head + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    try {
      body(context, static_cast<uint32_t>(head));
    } catch (...) {  // no memory: the job is finished all the same, so that nobody works for a caller that has left
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    if (done_.fetch_add(1, std::memory_order_seq_cst) + 1 == total && waiting_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(mutex_);
      finished_.notify_one();
    }
    head = head_.load(std::memory_order_acquire);
  }
}

void Pool::work() {
  const FloatMode mode;
  uint32_t seen = 0;
  Clock::duration budget = kMostSpin;
  const auto ready = [&] { return epoch() != seen || stop_.load(std::memory_order_relaxed); };
  for (;;) {
    const auto begin = Clock::now();
    const auto over = [&] { return ready() || resting_.load(std::memory_order_relaxed); };
    if (spin(begin + budget, over); !ready()) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, ready);
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
    // As long as the last wait was, where that was short: also if it was slept through. Else ever less.
    const auto waited = Clock::now() - begin;
    budget = waited < kMostSpin ? std::min<Clock::duration>(kMostSpin, std::max(budget, 2 * waited))
                                : std::max<Clock::duration>(kLeastSpin, budget / 2);
    if (stop_.load()) return;
    seen = epoch();
    drain(seen);
  }
}

}  // namespace iso
