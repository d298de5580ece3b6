// Weight memory and per-thread scratch buffers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace iso {

// 64-byte aligned, contents undefined. Large buffers lie side by side in regions for which huge pages are advised: an
// expert of 1.5 MB alone would get none. Released memory goes back to the system at once. Throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* data, size_t bytes);

// Buffers of the calling thread that keep their capacity from call to call. Contents are undefined.
enum ScratchSlot {
  kAccumulator,
  kAccumulator2,
  kPacked,
  kHidden,
  kGroups,
  kScores,
  kWeights,
  kValues,
  kOutput,
  kQuery,
  kExpanded,
  kEntries,
  kShared,
  kShared2,
  kLayer,
  kDraft,
  kWholes,
  kWholeGroups,
  kWholeScales,
  kScratchSlots
};
void* scratch(ScratchSlot slot, size_t bytes);

template <class T>
T* scratch_of(ScratchSlot slot, size_t count) {
  return static_cast<T*>(scratch(slot, count * sizeof(T)));
}

}  // namespace iso
