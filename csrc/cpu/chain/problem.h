// One call of the chain without its data: the C++ twin of res2net_fused/chain/problem.py, which checks the caller's arguments.
#pragma once

#include "cpu/kernels/kernels.h"

namespace res2net_fused {

enum class Passthrough : int64_t { last = 0, none = 1, first = 2, first_added = 3 };

struct ChainProblem {
  int64_t batch, height, width;
  int64_t channels;  // of a group, w
  int64_t steps;     // convolutions
  int64_t stride, dilation, groups;
  bool hierarchical;
  Passthrough passthrough;
  Pool pool;
  Activation activation;

  // No farther than the image reaches: beyond it a tap reads zeros however far it is, and the border takes memory.
  int64_t row_dilation() const { return dilation < height ? dilation : height; }
  int64_t column_dilation() const { return dilation < width ? dilation : width; }

  int64_t padded() const { return round_up(channels, kUnit); }
  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  int64_t scale() const { return steps + (passthrough != Passthrough::none); }
  // The group that the first convolution reads.
  int64_t first_convolved() const { return passthrough == Passthrough::first || passthrough == Passthrough::first_added; }
  // The group without a convolution, or -1.
  int64_t passed_group() const { return passthrough == Passthrough::none ? -1 : first_convolved() ? 0 : scale() - 1; }
  // Whether the convolved group reads x_i + y_{i-1} rather than x_i.
  bool adds(int64_t group) const {
    return hierarchical && (group > first_convolved() || (group == 1 && passthrough == Passthrough::first_added));
  }
  // Whether whole vectors from this group on stay inside `room` floats of its pixel.
  bool full_vectors(int64_t group, int64_t room) const { return group * channels + padded() <= room; }
};

}  // namespace res2net_fused
