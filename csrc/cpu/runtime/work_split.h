// How work is cut: into parts, one thread each, and their tiles into blocks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "cpu/kernels/kernels.h"

namespace res2net_fused {

inline int64_t thread_count() { return std::max<int64_t>(torch::stable::get_num_threads(), 1); }

struct WorkSplit {
  int64_t count;

  // Where a part's share of `total` begins; it ends where the next part's begins.
  int64_t share(int64_t total, int64_t part) const { return total * part / count; }

  // A part's share of `tiles`.
  Block block(int64_t tiles, int64_t part) const { return {share(tiles, part), share(tiles, part + 1) - share(tiles, part)}; }

  // Calls f(part) for every part, shared out over torch's threads.
  template <class F>
  void for_each(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; part++) f(part);
    });
  }
};

// Units of work that change hands: each part takes its own one by one from the front, so that it finds in its cache what it
// left there, and then those of others from the back. A core that is slower, or is wanted by somebody else too, holds up the
// others by one unit only, not by its whole share.
class WorkStealing {
 public:
  WorkStealing(int64_t units, int64_t parts) : split_{parts}, shares_(new Share[static_cast<size_t>(parts)]) {
    for (int64_t part = 0; part < parts; part++) {
      shares_[static_cast<size_t>(part)].left = ends(split_.share(units, part), split_.share(units, part + 1));
    }
  }

  // Calls f(unit) until none is left.
  template <class F>
  void work(int64_t part, const F& f) {
    for (int64_t i = 0; i < split_.count; i++) {
      Share& share = shares_[static_cast<size_t>((part + i) % split_.count)];
      for (int64_t unit; (unit = share.take(i == 0)) >= 0;) f(unit);
    }
  }

 private:
  // First and last unit in one word, so that both change at once.
  static uint64_t ends(int64_t first, int64_t last) { return static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(last); }

  struct alignas(64) Share {
    std::atomic<uint64_t> left;

    // -1 where none is left.
    int64_t take(bool front) {
      uint64_t now = left.load(std::memory_order_relaxed);
      for (;;) {
        const auto first = static_cast<int64_t>(now >> 32), last = static_cast<int64_t>(now & 0xffffffffu);
        if (first >= last) return -1;
        const uint64_t then = front ? ends(first + 1, last) : ends(first, last - 1);
        if (left.compare_exchange_weak(now, then, std::memory_order_relaxed)) return front ? first : last - 1;
      }
    }
  };

  const WorkSplit split_;
  const std::unique_ptr<Share[]> shares_;
};

// Calls f(part, unit) for every unit, by at most `parts` threads that take them from each other; a part is one thread's.
template <class F>
void share_out(int64_t units, int64_t parts, const F& f) {
  parts = std::max<int64_t>(std::min(parts, units), 1);
  WorkStealing work(units, parts);
  WorkSplit{parts}.for_each([&](int64_t part) { work.work(part, [&](int64_t unit) { f(part, unit); }); });
}

// Into how many pieces, from `fewest` to `most`, to cut each of `times` equal stacks of rows, a piece being a unit: the first
// number that keeps the threads busy for nine tenths of their time, or the one that does so longest. Of equal ones, that which
// leaves fewer threads without a unit.
inline int64_t row_cuts(int64_t rows, int64_t times, int64_t fewest, int64_t most, int64_t threads) {
  int64_t best = fewest, least = -1;
  for (int64_t cuts = fewest; cuts <= std::max(fewest, most); cuts++) {
    const int64_t time = divide_up(times * cuts, threads) * divide_up(rows, cuts);  // of the thread that ends last
    if (9 * threads * time <= 10 * times * rows) return cuts;
    if (least < 0 || time < least || (time == least && times * cuts <= threads)) {
      best = cuts;
      least = time;
    }
  }
  return best;
}

// Calls f(Block, its place among them) for tiles first ... last, in blocks of nearly equal size and at most `most` tiles.
template <class F>
void for_each_block(int64_t first, int64_t last, int64_t most, const F& f) {
  const WorkSplit blocks{divide_up(last - first, most)};
  for (int64_t b = 0; b < blocks.count; b++) {
    const Block block = blocks.block(last - first, b);
    f(Block{first + block.first, block.count}, b);
  }
}

}  // namespace res2net_fused
