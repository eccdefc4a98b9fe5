#include "workers.h"

#include <algorithm>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace flashmoe {
namespace {

// Spins before a thread sleeps or yields, some tens of microseconds: the loops of a token follow each other faster than
// a thread wakes up.
constexpr int MAX_SPINS = 4000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int count_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    return CPU_COUNT(&set);
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

Workers& Workers::shared() {
  static Workers* workers = new Workers;
  return *workers;
}

Workers::Workers() : cores_(count_cores()), threads_(cores_), ranges_(new Range[cores_]) {
  for (int thread = 1; thread < cores_; ++thread) {
    std::thread(&Workers::work, this, thread).detach();
  }
}

void Workers::set_threads(int threads) {
  std::lock_guard lock(one_loop_);
  threads_ = std::clamp(threads, 1, cores_);
}

void Workers::run(Loop& loop) {
  std::lock_guard lock(one_loop_);
  participants_ = threads();
  for (int i = 0; i < participants_; ++i) {
    ranges_[i].next = loop.count * i / participants_;
    ranges_[i].end = loop.count * (i + 1) / participants_;
  }
  if (participants_ > 1 && loop.count > 1) {
    loop_ = &loop;
    ++loops_;
    loops_.notify_all();
  }
  take_part(loop, 0);
  // A worker that wakes up from here on finds no loop. Wait only for those that may have seen it: a thread that is
  // still asleep delays nobody.
  loop_ = nullptr;
  for (int spins = 0; busy_; ++spins) {
    if (spins < MAX_SPINS) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void Workers::take_part(const Loop& loop, int thread) {
  for (int i = 0; i < participants_; ++i) {
    Range& range = ranges_[(thread + i) % participants_];
    for (int64_t item; (item = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
      loop.body(loop.context, item, thread);
    }
  }
}

void Workers::work(int thread) {
  for (uint32_t seen = 0;;) {
    for (int spins = 0; loops_ == seen && spins < MAX_SPINS; ++spins) {
      pause();
    }
    loops_.wait(seen);
    seen = loops_;
    ++busy_;
    Loop* loop = loop_;
    if (loop && thread < participants_) {
      take_part(*loop, thread);
    }
    --busy_;
  }
}

}  // namespace flashmoe
