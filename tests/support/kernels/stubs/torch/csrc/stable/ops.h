// Stands for PyTorch's header of this name where the kernels are compiled without PyTorch: one thread does everything, in the
// parts of three.
#pragma once

#include <cstdint>

namespace torch::stable {

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (begin < end) f(begin, end);
}

inline uint32_t get_num_threads() { return 3; }

}  // namespace torch::stable
