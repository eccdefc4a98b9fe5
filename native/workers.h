// A thread pool for loops.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>

namespace flashmoe {

class Workers {
 public:
  // The pool of the process. Its threads are never joined: a thread of MLX may be in a loop while the process exits.
  static Workers& shared();

  // The number of threads in use, including the one that calls run().
  int threads() const {
    return threads_.load(std::memory_order_relaxed);
  }

  // The most threads there can be: one for each core that the process may run on.
  int cores() const {
    return cores_;
  }

  // Set the number of threads, clamped to between 1 and cores().
  void set_threads(int threads);

  // Call body(item, thread) for each item below count, on any thread and in any order. One loop runs at a time.
  //
  // Each thread starts with a contiguous range of items, because sequential reads reach the highest memory bandwidth. A
  // thread that has finished its range steals items of the others.
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

  // What is left of a thread's range. Aligned to a cache line, because other threads write to theirs.
  struct alignas(64) Range {
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
  const std::unique_ptr<Range[]> ranges_;  // [cores]

  // Threads that have a range in the current loop.
  int participants_ = 1;

  std::atomic<Loop*> loop_ = nullptr;

  // Loops started so far: workers wait until this changes.
  std::atomic<uint32_t> loops_ = 0;

  // Workers that may hold a pointer to the current loop.
  std::atomic<int> busy_ = 0;
};

}  // namespace flashmoe
