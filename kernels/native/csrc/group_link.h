// The group's end of one link, with its mapping of the segment.
#pragma once

#include "ring.h"

#if defined(__linux__)

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <memory>
#include <new>

namespace iso {

class GroupLink {
 public:
  GroupLink(int64_t number, int segment, int socket, Bell* bell) : id(number), segment_(segment) {
    struct stat file;
    if (fstat(segment, &file) != 0) throw std::bad_alloc();
    map(file.st_size);
    first_ = base_, first_bytes_ = mapped;
    auto* const header = static_cast<Header*>(base_);
    try {
      if (header->magic != kMagic) throw std::bad_alloc();
      end = std::make_unique<End>(header, bell, &header->shard_bell, false, socket);
    } catch (...) {
      munmap(first_, static_cast<size_t>(first_bytes_));
      throw;
    }
  }
  ~GroupLink() {
    end.reset();
    if (base_ != first_) munmap(base_, static_cast<size_t>(mapped));
    munmap(first_, static_cast<size_t>(first_bytes_));
    close(segment_);
  }

  // Reads the message that is there. Returns what is wrong, or null.
  const char* take(int64_t now) {
    if (end->header->bytes.load(std::memory_order_acquire) > mapped) {  // the first mapping stays: the bell is in it
      void* const old = base_ == first_ ? nullptr : base_;
      const int64_t old_bytes = mapped;
      map(end->header->bytes.load(std::memory_order_acquire));
      if (old != nullptr) munmap(old, static_cast<size_t>(old_bytes));
      end->header = static_cast<Header*>(base_);
    }
    if (const char* wrong = end->read(mapped, &message)) return wrong;
    pending = true;
    came = now;
    return nullptr;
  }

  void answer(ReplyKind kind, int64_t bytes) {
    pending = false;
    answered_layer = message.request.layer;
    end->reply(message.sequence, kind, bytes);
    answered = now_ns();
  }

  int64_t per_expert() const { return message.request.active > 0 ? message.request.pairs / message.request.active : 0; }

  const int64_t id;
  std::unique_ptr<End> end;
  int64_t mapped = 0;
  bool pending = false;
  Message message{};
  int64_t came = 0, answered = 0, answered_layer = -1;

 private:
  void map(int64_t bytes) {
    // Beyond the end of the file reading would end the process: the header is another process's word.
    struct stat file;
    void* const at = bytes < kHeaderBytes || fstat(segment_, &file) != 0 || bytes > file.st_size
                         ? MAP_FAILED
                         : mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, segment_, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    base_ = at;
    mapped = bytes;
  }

  int segment_;
  void *base_ = nullptr, *first_ = nullptr;
  int64_t first_bytes_ = 0;
};

}  // namespace iso

#endif
