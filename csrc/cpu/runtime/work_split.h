// How work is cut: into parts, one thread each, and their tiles into blocks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/kernels/kernels.h"

namespace res2net_fused {

struct WorkSplit {
  int64_t count;

  // Where a part's share of `total` begins; it ends where the next part's begins.
  int64_t share(int64_t total, int64_t part) const { return total * part / count; }

  // Calls f(part) for every part, shared out over torch's threads.
  template <class F>
  void for_each(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; part++) f(part);
    });
  }
};

// Calls f(Block, its place among them) for tiles first ... last, in blocks of nearly equal size and at most `most` tiles.
template <class F>
void for_each_block(int64_t first, int64_t last, int64_t most, const F& f) {
  const int64_t count = last - first, blocks = (count + most - 1) / most;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t from = first + count * b / blocks;
    f(Block{from, first + count * (b + 1) / blocks - from}, b);
  }
}

}  // namespace res2net_fused
