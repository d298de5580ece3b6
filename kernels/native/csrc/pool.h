// A small thread pool for one job at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace iso {

// The caller takes part in its own job and could finish it alone: a worker that the system doesn't schedule delays
// nobody. Which thread runs an item never changes a result; items write disjoint outputs.
class Pool {
 public:
  // `aside`: null, or the name of workers that give way to other threads.
  explicit Pool(int threads, const char* aside = nullptr);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // body(context, i) for 0 <= i < items. Runs in the calling thread alone when another job holds the pool. What an item
  // throws is thrown here once all of them are done.
  void run(int64_t items, void (*body)(void*, int64_t), void* context);

  // No job comes for a while, and others need the cores: workers that spin go to sleep until the next job.
  void rest() { resting_.store(true, std::memory_order_relaxed); }

 private:
  using Body = void (*)(void*, int64_t);

  void work();
  void end();
  void drain(uint32_t epoch);
  uint32_t epoch() const { return static_cast<uint32_t>(head_.load(std::memory_order_seq_cst) >> 32); }

  // Epoch in the upper half, next item in the lower: claiming an item fails once its job is over, so a late worker
  // touches nothing.
  alignas(64) std::atomic<uint64_t> head_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> total_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> waiting_{false}, stop_{false}, resting_{false};

  std::mutex busy_, mutex_;
  std::condition_variable wake_, finished_;
  std::exception_ptr error_;  // the first of the job's
  std::vector<std::thread> workers_;
};

template <class F>
void parallel(Pool& pool, int64_t items, F& body) {
  pool.run(items, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &body);
}

}  // namespace iso
