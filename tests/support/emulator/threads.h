// The threads of one threadgroup. Threadgroups run one after another, so there is one set of threads.
//
// One thread runs at a time, without interruption, until it ends or waits for others. Simdgroups take turns at
// barriers, the lanes of a simdgroup at simd operations, all of them ascending or all descending. So of two threads
// that use the same memory with no barrier between, each goes first in one of the orders: these two are enough.

namespace emulator {

constexpr int simd_size = 32, most_threads = 1024;
volatile int stack_bytes = 1 << 16;  // of a thread; volatile, so that no compiler counts it as part of a frame

struct Registers {
  jmp_buf saved;
};

struct Thread {
  metal::uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  metal::uint3 threads_per_grid, threads_per_threadgroup, threadgroups_per_grid;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup, threads_per_simdgroup;

  uint lanes;             // of its simdgroup: fewer than 32 in the last one of a threadgroup
  Registers registers;    // of the thread while it waits
  const char* operation;  // that it waits in
  int line;               // of that operation
  uint turn;              // 0 or 1, by turns at simd operations
  uint declared;          // bytes of threadgroup memory so far
};

Thread threads[most_threads];
Thread* self;
bool descending;
Registers scheduler, starts[most_threads];
alignas(16) char threadgroup_memory[1 << 15];
alignas(16) char mailbox[2][simd_size * 16];

const char ended[] = "has ended", threadgroup_barrier[] = "threadgroup_barrier";

void run_thread();  // calls the kernel with the attributes of `self`
void run_grid();    // does not return

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  std::_Exit(1);
}

// Threads are fibers on one stack, made by calls that never return: `fiber` for thread i, which waits to be started,
// then `leave_room` for its calls, then `fiber` for thread i + 1 ... and below the last one, the scheduler.
// Other ways were dropped: OS threads take turns 100 times slower, and ucontext is deprecated on macOS.
void fiber(int i, int count);

[[gnu::noinline]] void leave_room(int i, int count) {
  void* room = __builtin_alloca(stack_bytes);
  asm volatile("" ::"r"(room) : "memory");  // the room is in use before the call, and after it
  fiber(i, count);
  asm volatile("" ::"r"(room) : "memory");
}

[[gnu::noinline]] void fiber(int i, int count) {
  if (i == count) run_grid();
  if (_setjmp(starts[i].saved) == 0) leave_room(i + 1, count);
  run_thread();
  self->operation = ended;
  _longjmp(scheduler.saved, 1);
}

[[gnu::noinline]] void resume(Thread& next) {
  self = &next;
  if (_setjmp(scheduler.saved) == 0) _longjmp(next.registers.saved, 1);
}

[[gnu::noinline]] void wait(const char* operation, int line) {
  self->operation = operation;
  self->line = line;
  if (_setjmp(self->registers.saved) == 0) _longjmp(scheduler.saved, 1);
}

int in_order(int i, int count) { return descending ? count - 1 - i : i; }

bool in_simd_operation(const Thread& t) { return t.operation != ended && t.operation != threadgroup_barrier; }

// Threads that wait for each other must do so in the same place.
void expect_together(const Thread* first, int count) {
  for (const Thread *a = first, *b = first; b < first + count; b++) {
    if (a->operation == b->operation && (a->operation == ended || a->line == b->line)) continue;
    if (a->operation == ended) std::swap(a, b);
    fail("kernel:%d: error: thread %u of a threadgroup waits in %s while thread %u %s%s", a->line,
         a->thread_index_in_threadgroup, a->operation, b->thread_index_in_threadgroup,
         b->operation == ended ? "" : "waits in another ", b->operation);
  }
}

void run_simdgroup(Thread* lanes, int count) {
  for (bool again = true; again;) {
    again = false;
    for (int i = 0; i < count; i++) resume(lanes[in_order(i, count)]);
    for (int i = 0; i < count; i++) again |= in_simd_operation(lanes[i]);
    if (again) expect_together(lanes, count);
  }
}

void run_threadgroup(int count) {
  int simdgroups = (count + simd_size - 1) / simd_size;
  do {
    for (int i = 0; i < simdgroups; i++) {
      Thread* lanes = threads + in_order(i, simdgroups) * simd_size;
      run_simdgroup(lanes, lanes->lanes);
    }
    expect_together(threads, count);
  } while (threads->operation != ended);
}

// A variable of the threadgroup. Threads declare the same ones in the same order, so they find them in the same place.
template <typename T>
T& shared() {
  char* place = threadgroup_memory + self->declared;
  self->declared += (sizeof(T) + 15) / 16 * 16;
  if (self->declared > sizeof threadgroup_memory) fail("more than 32768 bytes of threadgroup memory");
  return *reinterpret_cast<T*>(place);
}

// The values of all lanes. They stay until the next simd operation but one, which waits for all to leave the next one.
template <typename T>
const T* exchange(T value, const char* operation, int line) {
  static_assert(sizeof(T) <= 16);
  T* values = reinterpret_cast<T*>(mailbox[self->turn ^= 1]);
  values[self->thread_index_in_simdgroup] = value;
  wait(operation, line);
  return values;
}

template <typename T, typename Combine>
T reduce(T value, Combine combine, const char* operation, int line) {
  const T* values = exchange(value, operation, line);
  T result = values[0];
  for (uint lane = 1; lane < self->lanes; lane++) result = combine(result, values[lane]);
  return result;
}

template <typename T>
T from_lane(T value, uint lane, const char* operation, int line) {
  const T* values = exchange(value, operation, line);
  if (lane >= self->lanes) fail("kernel:%d: error: %s reads lane %u of %u", line, operation, lane, self->lanes);
  return values[lane];
}

}  // namespace emulator
