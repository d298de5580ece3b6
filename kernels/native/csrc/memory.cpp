#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <map>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace iso {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kExact = true;  // buffers end where their use ends, so that the sanitizer sees what goes past
#else
constexpr bool kExact = false;
#endif

#if defined(__linux__)
constexpr size_t kLarge = kExact ? SIZE_MAX : size_t{128} << 10;
#else
constexpr size_t kLarge = SIZE_MAX;
#endif

#if defined(__linux__)
constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20, kRegion = size_t{64} << 20;

constexpr size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// A mapped range and what of it is free: offset → size, neighbours merged.
struct Region {
  uint8_t* start;
  size_t size;
  std::map<size_t, size_t> free;

  bool empty() const { return free.size() == 1 && free.begin()->second == size; }

  void* take(size_t bytes) {
    const auto hole = std::find_if(free.begin(), free.end(), [&](const auto& f) { return f.second >= bytes; });
    if (hole == free.end()) return nullptr;
    const auto [offset, room] = *hole;
    free.erase(hole);
    if (room > bytes) free.emplace(offset + bytes, room - bytes);
    return start + offset;
  }

  void give(size_t offset, size_t bytes) {
    auto next = free.lower_bound(offset);
    if (next != free.end() && next->first == offset + bytes) {
      bytes += next->second;
      next = free.erase(next);
    }
    if (next != free.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        before->second += bytes;
        return;
      }
    }
    free.emplace(offset, bytes);
  }
};

class Regions {
 public:
  void* take(size_t bytes) {
    bytes = round_up(bytes, kPage);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Region& region : regions_) {
      if (void* data = region.take(bytes)) return data;
    }
    regions_.push_back(map(std::max(kRegion, round_up(bytes, kHugePage))));
    return regions_.back().take(bytes);
  }

  void give(void* data, size_t bytes) {
    bytes = round_up(bytes, kPage);
    auto* const at = static_cast<uint8_t*>(data);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto region = std::find_if(regions_.begin(), regions_.end(),
                                     [&](const Region& r) { return at >= r.start && at < r.start + r.size; });
    madvise(data, bytes, MADV_DONTNEED);
    region->give(static_cast<size_t>(at - region->start), bytes);
    if (region->empty()) {
      munmap(region->start, region->size);
      regions_.erase(region);
    }
  }

 private:
  static Region map(size_t size) {
    void* raw =
        mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) throw std::bad_alloc();
    auto* const first = static_cast<uint8_t*>(raw);
    const size_t skipped = round_up(reinterpret_cast<uintptr_t>(raw), kHugePage) - reinterpret_cast<uintptr_t>(raw);
    if (skipped > 0) munmap(first, skipped);
    if (skipped < kHugePage) munmap(first + skipped + size, kHugePage - skipped);
    madvise(first + skipped, size, MADV_HUGEPAGE);
    return Region{first + skipped, size, {{0, size}}};
  }

  std::mutex mutex_;
  std::list<Region> regions_;
};

Regions& regions() {
  static auto* const all = new Regions();  // never destroyed: threads may still release scratch while the process ends
  return *all;
}
#endif

}  // namespace

void* allocate(size_t bytes) {
  if (bytes == 0) bytes = 64;
#if defined(__linux__)
  if (bytes >= kLarge) return regions().take(bytes);
#endif
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
  return data;
}

void release(void* data, size_t bytes) {
  if (data == nullptr) return;
#if defined(__linux__)
  if (bytes >= kLarge) {
    regions().give(data, bytes);
    return;
  }
#endif
  std::free(data);
}

namespace {
struct Buffers {
  void* data[kScratchSlots] = {};
  size_t bytes[kScratchSlots] = {};
  ~Buffers() {
    for (int i = 0; i < kScratchSlots; ++i) release(data[i], bytes[i]);
  }
};
thread_local Buffers buffers;
}  // namespace

void* scratch(ScratchSlot slot, size_t bytes) {
  if (buffers.bytes[slot] < bytes || kExact) {
    release(buffers.data[slot], buffers.bytes[slot]);
    buffers.data[slot] = nullptr;
    buffers.bytes[slot] = 0;
    const size_t size = kExact ? bytes : (bytes + bytes / 4 + 4095) & ~size_t{4095};
    buffers.data[slot] = allocate(size);
    buffers.bytes[slot] = size;
  }
  return buffers.data[slot];
}

}  // namespace iso
