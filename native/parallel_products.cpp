#include "parallel_products.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "operation.h"
#include "workers.h"

namespace flashmoe {
namespace {

constexpr uint32_t NO_SLOT = 0xffffffff;

// Vectors that are multiplied with a chunk at a time.
constexpr int64_t BATCH = 16;

// Weights of a chunk: enough for long sequential reads, and few enough to stay in the L2 cache.
constexpr int64_t CHUNK_NBYTES = 1 << 18;

// Rows of a chunk: about 8 chunks a thread, so that all threads finish at the same time.
int64_t chunk_rows(const Product& product, int64_t groups) {
  const int64_t shares = Workers::shared().threads() * 8;
  const int64_t fair = (product.matrix.rows * groups + shares - 1) / shares;
  const int64_t most = CHUNK_NBYTES / (product.matrix.columns / 8 * product.matrix.bits);
  return std::clamp<int64_t>((std::min(fair, most) + 3) / 4 * 4, 4, MAX_CHUNK_ROWS);
}

Matrix matrix_in_slot(const Matrix& first, int64_t slot) {
  Matrix matrix = first;
  const int64_t itemsize = first.stored == Scales::float32 ? 4 : 2;
  const int64_t nbytes = first.rows * first.columns / first.group * itemsize;
  matrix.weight += slot * (first.rows * first.columns / 32 * first.bits);
  matrix.scales = static_cast<const char*>(first.scales) + slot * nbytes;
  matrix.biases = static_cast<const char*>(first.biases) + slot * nbytes;
  return matrix;
}

// A product, divided into items that threads take: an item is a chunk of rows of one slot, for all pairs of that slot.
struct Plan {
  const Product& product;
  const BufferSizes sizes;

  // Of a thread: scratch memory, then results of the up matrix.
  const int64_t thread_floats;

  // Pairs sorted by slot, and where the pairs of each slot begin, with the end of the last.
  std::vector<int64_t> order;
  std::vector<int64_t> begins = {0};

  int64_t chunk, chunks, items;
  float* packed = nullptr;
  float* threads = nullptr;

  explicit Plan(const Product& product)
      : product(product),
        sizes(kernels().buffer_sizes(product.matrix)),
        thread_floats(padded(sizes.scratch) + (product.up ? BATCH * MAX_CHUNK_ROWS : 0)),
        order(product.pairs) {
    std::iota(order.begin(), order.end(), 0);
    if (product.slots) {
      const uint32_t* const slots = product.slots;
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return slots[a] < slots[b]; });
      for (int64_t i = 1; i < product.pairs; ++i) {
        if (slots[order[i]] != slots[order[i - 1]]) {
          begins.push_back(i);
        }
      }
    }
    const int64_t groups = begins.size();
    begins.push_back(product.pairs);
    chunk = chunk_rows(product, groups);
    chunks = (product.matrix.rows + chunk - 1) / chunk;
    items = groups * chunks;
  }

  int64_t floats() const {
    return product.vectors * sizes.packed_vector + Workers::shared().cores() * thread_floats;
  }

  void use_memory(float* memory) {
    packed = memory;
    threads = packed + product.vectors * sizes.packed_vector;
  }

  void pack(int64_t vector) const {
    const float* const x = product.x + vector * product.matrix.columns;
    kernels().pack_vector(product.matrix, x, packed + vector * sizes.packed_vector);
  }

  void multiply(int64_t item, int thread) const {
    const Kernels& kernel = kernels();
    const int64_t rows = product.matrix.rows;
    const int64_t pairs_per_vector = product.pairs / product.vectors;
    const int64_t group = item / chunks;
    const int64_t begin = item % chunks * chunk;
    const int64_t end = std::min(rows, begin + chunk);
    const int64_t slot = product.slots ? product.slots[order[begins[group]]] : 0;
    if (slot == NO_SLOT) {
      for (int64_t pair = begins[group]; pair < begins[group + 1]; ++pair) {
        std::fill_n(product.out + order[pair] * rows + begin, end - begin, 0.0f);
      }
      return;
    }
    float* const scratch = threads + thread * thread_floats;
    for (int64_t first = begins[group]; first < begins[group + 1]; first += BATCH) {
      const int64_t count = std::min(BATCH, begins[group + 1] - first);
      const float* x[BATCH];
      float* out[BATCH];
      float* up[BATCH];
      for (int64_t i = 0; i < count; ++i) {
        x[i] = packed + order[first + i] / pairs_per_vector * sizes.packed_vector;
        out[i] = product.out + order[first + i] * rows + begin;
        up[i] = scratch + padded(sizes.scratch) + i * MAX_CHUNK_ROWS;
      }
      kernel.multiply(matrix_in_slot(product.matrix, slot), begin, end, x, out, count, scratch);
      if (product.up) {
        kernel.multiply(matrix_in_slot(*product.up, slot), begin, end, x, up, count, scratch);
        for (int64_t i = 0; i < count; ++i) {
          kernel.swiglu(out[i], up[i], end - begin);
        }
      }
    }
  }
};

}  // namespace

void multiply(std::span<const Product> products) {
  Workers& workers = Workers::shared();
  std::vector<Plan> plans;
  plans.reserve(products.size());
  int64_t floats = 0, items = 0;
  for (const Product& product : products) {
    const Plan& plan = plans.emplace_back(product);
    floats += plan.floats();
    items += plan.items;
  }
  float* memory = scratch(floats);
  for (Plan& plan : plans) {
    plan.use_memory(memory);
    memory += plan.floats();
    workers.run(plan.product.vectors, [&](int64_t vector, int) { plan.pack(vector); });
  }
  workers.run(items, [&](int64_t item, int thread) {
    size_t number = 0;
    for (; item >= plans[number].items; ++number) {
      item -= plans[number].items;
    }
    plans[number].multiply(item, thread);
  });
}

}  // namespace flashmoe
