// Runs work on the threads of XLA's pool.

#ifndef FLAX_DENSENET_CPU_PARALLEL_H_
#define FLAX_DENSENET_CPU_PARALLEL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Runs f(0), ..., f(parts - 1) on the pool. The caller also runs parts and never waits for
// a part that has not started, so this cannot deadlock if all threads of the pool wait.
inline void parallel(xla::ffi::ThreadPool& pool, int parts, std::function<void(int)> f) {
  if (parts == 1) return f(0);
  struct State {
    std::function<void(int)> f;
    int parts;
    std::atomic<int> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all;
    void work() {
      for (int i; (i = next++) < parts;) {
        f(i);
        if (++done == parts) {
          std::lock_guard<std::mutex> lock(mutex);
          all.notify_all();
        }
      }
    }
  };
  auto state = std::make_shared<State>();
  state->f = std::move(f);
  state->parts = parts;
  for (int i = 1; i < parts; ++i) pool.Schedule([state] { state->work(); });
  state->work();
  for (int spin = 0; spin < 20000 && state->done < parts; ++spin) pause_briefly();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done == parts; });
}

// Many short phases with `parts` parts each. The threads of the pool stay between phases,
// so a phase costs about a microsecond instead of a wake-up. As in `parallel`, the caller
// also runs parts and only waits for parts that another thread has started.
class Crew {
 public:
  Crew(xla::ffi::ThreadPool& pool, int parts) : state_(std::make_shared<State>()) {
    state_->parts = parts;
    for (int i = 1; i < parts; ++i)
      pool.Schedule([state = state_] { state->follow(); });
  }
  ~Crew() { state_->ticket.store(State::kEnd); }
  Crew(const Crew&) = delete;

  // f(0), ..., f(parts - 1); returns when all are done.
  void run(const std::function<void(int)>& f) {
    State& s = *state_;
    s.f = &f;
    s.done.store(0);
    s.ticket.store(++phase_ << 32);
    while (s.take(phase_)) {
    }
    while (s.done.load() < s.parts) s.wait();
  }

 private:
  struct State {
    static constexpr uint64_t kEnd = ~uint64_t{0};
    int parts = 0;
    const std::function<void(int)>* f = nullptr;
    std::atomic<uint64_t> ticket{0};  // the phase, and in the low half the next part
    std::atomic<int> done{0};

    // Runs one part of the phase, if there is one left.
    bool take(uint64_t phase) {
      uint64_t now = ticket.load();
      do {
        if (now == kEnd || now >> 32 != phase || (int)(uint32_t)now >= parts)
          return false;
      } while (!ticket.compare_exchange_weak(now, now + 1));
      (*f)((int)(uint32_t)now);
      ++done;
      return true;
    }
    void wait() {
      for (int spin = 0; spin < 64; ++spin) pause_briefly();
      if (++idle % 64 == 0) std::this_thread::yield();
    }
    void follow() {
      for (uint64_t now; (now = ticket.load()) != kEnd;)
        if (now == 0 || !take(now >> 32)) wait();
    }
    static thread_local unsigned idle;
  };
  std::shared_ptr<State> state_;
  uint64_t phase_ = 0;
};
inline thread_local unsigned Crew::State::idle = 0;

}  // namespace

#endif  // FLAX_DENSENET_CPU_PARALLEL_H_
