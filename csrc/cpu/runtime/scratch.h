// Scratch memory for one call, from a bounded cache of blocks. Safe for concurrent calls: a block has one owner at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace res2net_fused {

class Scratch {
 public:
  // Throws std::bad_alloc. Of no floats: data() is null. The contents are whatever the last owner left;
  // RES2NET_FUSED_CPU_POISON=1 fills them with NaN.
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }

 private:
  float* data_;
  size_t bytes_;
};

// Asks for huge pages under `bytes` of fresh memory: weights of many MB are read from end to end, and with small pages the
// address translations alone take longer than the products.
void ask_for_huge_pages(void* data, int64_t bytes);

// Bytes that the cache holds now; with `release` it frees them first.
int64_t cached_scratch_bytes(bool release);

}  // namespace res2net_fused
