#include "workers.h"

#include <algorithm>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace flashmoe {
namespace {

constexpr int PAUSES = 4000;  // tens of microseconds: loops of a token follow each other faster than a thread wakes

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

Workers::Workers() : cores_(count_cores()), threads_(cores_), shares_(new Share[cores_]) {
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
  sharing_ = threads();
  for (int i = 0; i < sharing_; ++i) {
    shares_[i].next = loop.count * i / sharing_;
    shares_[i].end = loop.count * (i + 1) / sharing_;
  }
  if (sharing_ > 1 && loop.count > 1) {
    loop_ = &loop;
    ++loops_;
    loops_.notify_all();
  }
  take_part(loop, 0);
  // A worker that comes now finds no loop; one that came before is waited for. Who sleeps keeps nobody waiting.
  loop_ = nullptr;
  for (int pauses = 0; busy_; ++pauses) {
    if (pauses < PAUSES) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void Workers::take_part(const Loop& loop, int thread) {
  for (int i = 0; i < sharing_; ++i) {
    Share& share = shares_[(thread + i) % sharing_];
    for (int64_t item; (item = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      loop.body(loop.context, item, thread);
    }
  }
}

void Workers::work(int thread) {
  for (uint32_t seen = 0;;) {
    for (int pauses = 0; loops_ == seen && pauses < PAUSES; ++pauses) {
      pause();
    }
    loops_.wait(seen);
    seen = loops_;
    ++busy_;
    Loop* loop = loop_;
    if (loop && thread < sharing_) {
      take_part(*loop, thread);
    }
    --busy_;
  }
}

}  // namespace flashmoe
