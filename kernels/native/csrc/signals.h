// Threads of this library take no signals: those belong to the threads that the host program made.
#pragma once

#include <csignal>

namespace iso {

// While this lives, all signals are blocked in the calling thread, and so in one that it starts.
class SignalsBlocked {
 public:
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;
#if defined(__linux__)
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
#else
  SignalsBlocked() {}
  ~SignalsBlocked() {}
#endif
};

}  // namespace iso
