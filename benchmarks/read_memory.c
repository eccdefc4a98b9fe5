// Reads memory with nothing else to do. Compiled and called by cpu.py.
#include <stddef.h>
#include <stdint.h>

uint64_t read_all(const uint64_t *words, size_t count, int threads) {
    uint64_t sum = 0;
#pragma omp parallel for simd reduction(+ : sum) num_threads(threads) schedule(static)
    for (size_t i = 0; i < count; i++) sum += words[i];
    return sum;
}
