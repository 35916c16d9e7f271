// What the parts of the emulator's test share: tiny kernels, each with a known verdict.
#pragma once
#include <cstdio>
#include <string>

#include "cuda/chain/hardware_sm90.h"

inline int failures = 0;
alignas(16) inline uint32_t global_words[64];

// Runs a kernel in six orders; `verdict` is the name of the only kind of finding, "" or "any".
template <class Kernel>
void expect(const char* title, const char* verdict, emulator::Launch launch, Kernel kernel) {
  for (launch.seed = 0; launch.seed < 6; launch.seed++) {
    const emulator::Report report = emulator::run(launch, kernel);
    std::string kinds;
    for (int kind = 0; kind < emulator::KINDS; kind++)
      if (report.count[kind]) kinds += emulator::KIND_NAMES[kind];
    if (verdict == std::string("any") ? kinds.empty() : kinds != verdict) {
      std::printf("%s, seed %d: found '%s', expected '%s'\n", title, int(launch.seed), kinds.c_str(), verdict);
      failures++;
    }
  }
}
// A kernel of one cluster.
template <class Kernel>
void expect(const char* title, const char* verdict, int threads, Kernel kernel, int ctas = 1, int bytes = 1024) {
  expect(title, verdict, {ctas, threads, bytes, 0, true, {{"words", global_words, sizeof global_words, true}}, ctas}, kernel);
}

inline SharedPtr word(int index) { return shared_memory() + index * 4; }
inline void store(int index) { shared_store(word(index), uint32_t(index)); }
inline void load(int index) {
  if (shared_load<uint32_t>(word(index)) != uint32_t(index)) failures++;
}
inline int next_lane() { return thread_index() / 32 * 32 + (thread_index() + 1) % 32; }

// Defined in emulator_arrivals_test.cpp.
void cluster_kernels();
void bulk_copies();
void overlapping_kernels();
