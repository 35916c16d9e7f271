// Stands for PyTorch's header of this name where the kernels are compiled without PyTorch: one thread does everything, in the
// parts of as many as are asked for.
#pragma once

#include <cstdint>

namespace torch::stable {

struct Sharing {
  uint32_t threads = 3;
  int64_t regions = 0, parts = 0;  // how often work was shared out, and into how many parts the last time
};
inline Sharing sharing;

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  sharing.regions++;
  sharing.parts = end - begin;
  if (begin < end) f(begin, end);
}

inline uint32_t get_num_threads() { return sharing.threads; }

}  // namespace torch::stable
