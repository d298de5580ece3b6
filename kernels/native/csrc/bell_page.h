// A group's bell, in a page that its shards have mapped too.
#pragma once

#include "ring.h"

#if defined(__linux__)

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace iso {

class BellPage {
 public:
  BellPage() : file_(memfd_create("isotherm bell", MFD_CLOEXEC)) {
    void* page = MAP_FAILED;
    if (file_ >= 0 && ftruncate(file_, kHeaderBytes) == 0)
      page = mmap(nullptr, kHeaderBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (page == MAP_FAILED) {
      if (file_ >= 0) close(file_);
      throw std::bad_alloc();
    }
    bell_ = static_cast<Bell*>(page);
  }
  ~BellPage() {
    munmap(bell_, kHeaderBytes);
    close(file_);
  }
  BellPage(const BellPage&) = delete;
  BellPage& operator=(const BellPage&) = delete;

  Bell* bell() const { return bell_; }
  int file() const { return file_; }

 private:
  int file_;
  Bell* bell_;
};

}  // namespace iso

#endif
