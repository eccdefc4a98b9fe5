// Runs a kernel twice, in both orders of its threads, each buffer between pages that nobody may touch: first flush with
// the page behind it, then flush with the page before it. All that the kernel was not given and did not write is
// poison, of another value in the second run. So a forbidden access ends the program, or makes the two results differ.
//
//   main GRID(3) THREADGROUP(3) {NAME BYTES BYTES-PER-ELEMENT in|out}...   < inputs   > outputs

namespace emulator {

constexpr int most_buffers = 64;
constexpr long guard = 1 << 20;  // bytes before the pages of a buffer, and behind them

struct Buffer {
  const char* name;
  long bytes, element, pages;  // all of them in bytes
  bool input;
  char* content;  // of an input
};

struct Run {
  bool descending, flush_with_end;
  uchar poison;
  char *pages[most_buffers], *start[most_buffers];
};

Buffer buffers[most_buffers];
int buffer_count;
metal::uint3 grid, group;
Run runs[] = {{false, true, 0xa5, {}, {}}, {true, false, 0x5a, {}, {}}, {true, true, 0xa5, {}, {}}};
Run* current;

char* argument(int i) { return current->start[i]; }

long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

long index_at(const Buffer& b, long offset) { return (offset - (offset < 0 ? b.element - 1 : 0)) / b.element; }

[[noreturn]] void fail_outside(const Buffer& b, long offset, const char* what) {
  fail("%s is out of bounds: %s[%ld], and it has %ld elements", what, b.name, index_at(b, offset), b.bytes / b.element);
}

void on_fault(int, siginfo_t* info, void*) {
  char *address = static_cast<char*>(info->si_addr), by[64];
  metal::uint3 p = self->thread_position_in_grid;
  std::snprintf(by, sizeof by, "thread (%u, %u, %u)", p.x, p.y, p.z);
  for (int i = 0; i < buffer_count; i++) {
    const Buffer& b = buffers[i];
    char* pages = current->pages[i];
    if (address < pages - guard || address >= pages + b.pages + guard) continue;
    long offset = address - current->start[i];
    if (offset < 0 || offset >= b.bytes) fail_outside(b, offset, by);
    fail("%s writes to the input %s[%ld]", by, b.name, index_at(b, offset));
  }
  fail("%s is out of bounds, and far from every buffer", by);
}

void map(const Buffer& b, char*& pages, char*& start) {
  char* space = static_cast<char*>(mmap(nullptr, guard + b.pages + guard, PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0));
  if (space == MAP_FAILED) fail("no memory for %s", b.name);
  pages = space + guard;
  start = current->flush_with_end ? pages + b.pages - round_up(b.bytes, 16) : pages;  // stays aligned
  mprotect(pages, b.pages, PROT_READ | PROT_WRITE);
  std::memset(pages, current->poison, b.pages);
  if (b.input) std::memcpy(start, b.content, b.bytes);
  if (b.input) mprotect(pages, b.pages, PROT_READ);
}

// What lies between a buffer and the next page that faults.
void expect_poison_around(const Buffer& b, const char* pages, const char* start) {
  for (const char* p = pages; p < pages + b.pages; p++) {
    if (p == start) p += b.bytes;
    if (p < pages + b.pages && uchar(*p) != current->poison) fail_outside(b, p - start, "a write");
  }
}

void run_one_threadgroup(metal::uint3 position, metal::uint3 groups) {
  metal::uint3 size, first = position * group;
  for (int i = 0; i < 3; i++) size[i] = metal::min(group[i], grid[i] - first[i]);  // the last ones are smaller
  uint count = size.x * size.y * size.z;
  for (uint i = 0; i < count; i++) {
    Thread& t = threads[i];
    t.thread_position_in_threadgroup = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    t.thread_position_in_grid = first + t.thread_position_in_threadgroup;
    t.threadgroup_position_in_grid = position;
    t.threads_per_grid = grid;
    t.threads_per_threadgroup = size;
    t.threadgroups_per_grid = groups;
    t.thread_index_in_threadgroup = i;
    t.thread_index_in_simdgroup = i % simd_size;
    t.simdgroup_index_in_threadgroup = i / simd_size;
    t.simdgroups_per_threadgroup = (count + simd_size - 1) / simd_size;
    t.threads_per_simdgroup = simd_size;
    t.lanes = metal::min(count - i / simd_size * simd_size, uint(simd_size));
    t.registers = starts[i];
    t.turn = t.declared = 0;
  }
  std::memset(threadgroup_memory, current->poison + 1, sizeof threadgroup_memory);
  run_threadgroup(count);
}

void run(Run& r) {
  current = &r;
  descending = r.descending;
  for (int i = 0; i < buffer_count; i++) map(buffers[i], r.pages[i], r.start[i]);
  metal::uint3 groups = (grid + group - 1) / group;
  int count = groups.x * groups.y * groups.z;
  for (int i = 0; i < count; i++) {
    uint at = in_order(i, count);
    run_one_threadgroup({at % groups.x, at / groups.x % groups.y, at / groups.x / groups.y}, groups);
  }
  for (int i = 0; i < buffer_count; i++) expect_poison_around(buffers[i], r.pages[i], r.start[i]);
}

bool all_poison(const Buffer& b, const char* element, uchar poison) {
  for (int i = 0; i < b.element; i++)
    if (uchar(element[i]) != poison) return false;
  return true;
}

[[noreturn]] void explain_difference(int i, long index) {
  const Buffer& b = buffers[i];
  long offset = index * b.element;
  const char *one = runs[0].start[i] + offset, *two = runs[1].start[i] + offset;
  if (all_poison(b, one, runs[0].poison) && all_poison(b, two, runs[1].poison))
    fail("output %s: element %ld was never written", b.name, index);
  run(runs[2]);  // differs from the first run in nothing but the order
  if (std::memcmp(one, runs[2].start[i] + offset, b.element))
    fail("output %s: element %ld depends on the order in which threads run: a barrier is missing", b.name, index);
  fail("output %s: element %ld depends on memory that was never written or lies outside of a buffer", b.name, index);
}

void run_grid() {
  run(runs[0]);
  run(runs[1]);
  for (int i = 0; i < buffer_count; i++) {
    const char *one = runs[0].start[i], *two = runs[1].start[i];
    for (long offset = 0; offset < buffers[i].bytes; offset++)
      if (one[offset] != two[offset]) explain_difference(i, offset / buffers[i].element);
    if (!buffers[i].input) std::fwrite(one, 1, buffers[i].bytes, stdout);
  }
  std::exit(0);
}

void* run_fibers(void*) {
  fiber(0, group.x * group.y * group.z);
  return nullptr;
}

}  // namespace emulator

int main(int, char** arguments) {
  using namespace emulator;
  for (int i = 0; i < 3; i++) grid[i] = std::atoi(*++arguments);
  for (int i = 0; i < 3; i++) group[i] = metal::min(grid[i], uint(std::atoi(*++arguments)));  // as MLX does
  if (long(group.x) * group.y * group.z > most_threads) fail("a threadgroup of more than %d threads", most_threads);
  while (*++arguments) {
    if (buffer_count == most_buffers) fail("more than %d buffers", most_buffers);
    Buffer& b = buffers[buffer_count++];
    b.name = *arguments;
    b.bytes = std::atol(*++arguments);
    b.element = std::atol(*++arguments);
    b.pages = round_up(metal::max(b.bytes, 1L), sysconf(_SC_PAGESIZE));
    b.input = **++arguments == 'i';
    if (!b.input) continue;
    b.content = static_cast<char*>(std::malloc(b.bytes + 1));
    if (long(std::fread(b.content, 1, b.bytes, stdin)) != b.bytes) fail("no content for %s", b.name);
  }

  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);

  pthread_t runner;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, (most_threads + 16L) * (stack_bytes + 1024));
  if (pthread_create(&runner, &attributes, run_fibers, nullptr)) fail("no memory for the stack");
  pthread_join(runner, nullptr);
}
