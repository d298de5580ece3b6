// Consecutive pieces of one of the calling thread's buffers, each on a cache line of its own.
#pragma once

#include "memory.h"

namespace iso {

class Pieces {
 public:
  explicit Pieces(size_t element) : element_(element) {}  // bytes of an element
  size_t add(int64_t elements) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(elements) * element_ + 63) & ~size_t{63};
    return at;
  }
  void allocate(ScratchSlot slot = kLayer) { base_ = scratch_of<uint8_t>(slot, bytes_); }
  uint8_t* at(size_t piece) const { return base_ + piece; }
  template <class T>
  T* as(size_t piece) const {
    return reinterpret_cast<T*>(base_ + piece);
  }

 private:
  size_t element_, bytes_ = 0;
  uint8_t* base_ = nullptr;
};

}  // namespace iso
