#include "cpu/chain/stem.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/runtime/scratch.h"
#include "cpu/runtime/work_split.h"

namespace res2net_fused {
namespace {

constexpr int64_t kUnitsOfPart = 8;  // a part that takes another one's unit computes the rows around it again

// Rows of the images or of a convolution's output, as many as the next one reads at once: row y is at place y % kept.
//
//   |0 0 0| pixels ................ |0 0 0|   as wide as the kernels behind it reach
struct Level {
  int64_t channels, height, width;       // of the whole plane
  int64_t left = 0, pitch = 0, kept = 0;  // pixels of zeros before a row; floats of a row; rows
  // What the next one reads of it for its row r: rows r * stride - padding and so many.
  int64_t taps = 0, stride = 1, padding = 0;
  float* rows = nullptr;
  int64_t next = 0;  // the first row that is not there yet

  int64_t floats() const { return kept * pitch; }
  float* row(int64_t y) const { return rows + y % kept * pitch; }
};

// The planes of one call, the images first, the pooled one last. What is written to `out` is not kept.
std::vector<Level> levels_of(const StemData& data) {
  std::vector<Level> levels{{data.channels, data.height, data.width}};
  for (const StemConvolution& c : data.convolutions) {
    Level& source = levels.back();
    const int64_t height = convolved_size(source.height, c.kernel_height, c.row_stride, c.row_padding);
    const int64_t width = convolved_size(source.width, c.kernel_width, c.column_stride, c.column_padding);
    source.left = c.column_padding;
    const int64_t reached = (width - 1) * c.column_stride + c.kernel_width;
    source.pitch = round_up(std::max(source.left + source.width, reached) * source.channels, kPanel);
    source.kept = source.taps = c.kernel_height;
    source.stride = c.row_stride;
    source.padding = c.row_padding;
    levels.push_back({c.channels, height, width});
  }
  if (data.pools) {
    Level& source = levels.back();
    source.pitch = source.width * source.channels;
    source.kept = source.taps = 3;
    source.stride = 2;
    source.padding = 1;
    levels.push_back({source.channels, pooled_size(source.height), pooled_size(source.width)});
  }
  return levels;
}

// Some rows of the output, by one thread.
class StemPart {
 public:
  StemPart(const StemData& data, const Kernels& kernels, const std::vector<Level>& levels, float* memory)
      : data_(data), kernels_(kernels), levels_(levels), zeros_(memory) {
    std::memset(memory, 0, static_cast<size_t>(floats(levels)) * sizeof(float));
    memory += widest(levels);
    for (Level& level : levels_) {
      level.rows = memory;
      memory += level.floats();
    }
  }

  static int64_t floats(const std::vector<Level>& levels) {
    int64_t sum = widest(levels);
    for (const Level& level : levels) sum += level.floats();
    return sum;
  }

  // Rows first ... last of image n. Behind those of the call before, nothing is computed twice.
  void run(int64_t n, int64_t first, int64_t last) {
    if (n != image_ || levels_.back().next != first) {
      image_ = n;
      for (Level& level : levels_) level.next = 0;
      levels_.back().next = first;
    }
    produce(levels_.size() - 1, last);
  }

 private:
  static int64_t widest(const std::vector<Level>& levels) {
    int64_t most = 0;
    for (const Level& level : levels) most = std::max(most, level.pitch);
    return most;
  }

  // Rows of a level up to `last`, and what they need of those before it.
  void produce(size_t at, int64_t last) {
    Level& level = levels_[at];
    for (; level.next < last; level.next++) {
      if (at == 0) {
        copy_row(level, level.next);
        continue;
      }
      Level& source = levels_[at - 1];
      const int64_t top = level.next * source.stride - source.padding;
      source.next = std::max(source.next, top);
      produce(at - 1, std::min(top + source.taps, source.height));
      write_row(at, top);
    }
  }

  void copy_row(const Level& level, int64_t y) const {
    const float* const from = data_.x + image_ * data_.image + y * data_.row;
    float* const to = level.row(y) + level.left * level.channels;
    if (data_.channel == 1 && data_.pixel == level.channels) {
      std::memcpy(to, from, static_cast<size_t>(level.width * level.channels) * sizeof(float));
      return;
    }
    for (int64_t c = 0; c < level.channels; c++) {
      for (int64_t x = 0; x < level.width; x++) to[x * level.channels + c] = from[c * data_.channel + x * data_.pixel];
    }
  }

  // top: of the source, the first row that is read.
  void write_row(size_t at, int64_t top) const {
    const Level &level = levels_[at], &source = levels_[at - 1];
    const bool last = at + 1 == levels_.size();
    float* const out = last ? data_.out + (image_ * level.height + level.next) * level.width * level.channels
                            : level.row(level.next) + level.left * level.channels;
    std::array<const float*, kMaxTaps> rows;
    const bool pools = last && data_.pools;
    for (int64_t t = 0; t < source.taps; t++) {
      const bool inside = 0 <= top + t && top + t < source.height;
      // The middle one of three is always there; once more it changes no maximum.
      rows[static_cast<size_t>(t)] = inside ? source.row(top + t) : pools ? source.row(top + 1) : zeros_;
    }
    if (pools) {
      return kernels_.max_row({source.width, source.channels, source.channels, 2, source.channels}, rows.data(), out);
    }
    const StemConvolution& c = data_.convolutions[at - 1];
    const RowConvolution row{
        c.kernel_height, c.kernel_width * source.channels, c.column_stride * source.channels, c.weights, c.bias, c.channels};
    kernels_.convolve_row(row, rows.data(), out, level.width);
  }

  const StemData& data_;
  const Kernels& kernels_;
  std::vector<Level> levels_;
  const float* zeros_;  // a row that is not there
  int64_t image_ = -1;
};

}  // namespace

void run_stem(const StemData& data, const Kernels& kernels) {
  const std::vector<Level> levels = levels_of(data);
  const int64_t height = levels.back().height, rows = data.batch * height;
  const WorkSplit parts{std::min(thread_count(), rows)}, units{std::min(rows, kUnitsOfPart * parts.count)};
  const int64_t each = round_up(StemPart::floats(levels), 1024);
  const Scratch scratch(each * parts.count);
  WorkStealing work(units.count, parts.count);
  parts.for_each([&](int64_t part) {
    StemPart run(data, kernels, levels, scratch.data() + part * each);
    work.work(part, [&](int64_t unit) {
      const int64_t last = units.share(rows, unit + 1);
      for (int64_t row = units.share(rows, unit); row < last;) {
        const int64_t n = row / height, end = std::min(last, (n + 1) * height);
        run.run(n, row - n * height, end - n * height);
        row = end;
      }
    });
  });
}

}  // namespace res2net_fused
