// Threads that share a loop with whoever runs it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>

namespace flashmoe {

class Workers {
 public:
  // The process's. They are never stopped: a thread of MLX may compute while the process ends.
  static Workers& shared();

  // Including the thread that calls run().
  int threads() const {
    return threads_.load(std::memory_order_relaxed);
  }

  // The most there can be.
  int cores() const {
    return cores_;
  }

  // Use fewer of them, or all again: at least 1, at most one for each core of the process.
  void set_threads(int threads);

  // Call body(item, thread) for each item below count, on any thread, in any order. One loop at a time. Threads begin
  // with items in a row, each in a share of its own, because memory is fastest on long ways; who is done helps others.
  template <typename Body>
  void run(int64_t count, Body&& body) {
    using Type = std::remove_reference_t<Body>;
    Loop loop{
        [](void* context, int64_t item, int thread) { (*static_cast<Type*>(context))(item, thread); }, &body, count};
    run(loop);
  }

 private:
  struct Loop {
    void (*body)(void* context, int64_t item, int thread);
    void* context;
    int64_t count;
  };

  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  Workers();
  void run(Loop& loop);
  void take_part(const Loop& loop, int thread);
  void work(int thread);

  std::mutex one_loop_;
  const int cores_;
  std::atomic<int> threads_;
  const std::unique_ptr<Share[]> shares_;  // of the loop, one for each thread
  int sharing_ = 1;                        // threads that have one
  std::atomic<Loop*> loop_ = nullptr;
  std::atomic<uint32_t> loops_ = 0;  // begun so far: what workers wait for
  std::atomic<int> busy_ = 0;        // workers that may have seen the loop
};

}  // namespace flashmoe
