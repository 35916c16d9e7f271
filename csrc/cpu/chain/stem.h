// A network's stem in eval mode: convolutions with ReLU one behind the other, and a max pooling, by rows that stay in cache.
#pragma once

#include <vector>

#include "cpu/kernels/kernels.h"

namespace res2net_fused {

constexpr int64_t kMaxTaps = 16;  // rows of a kernel

// A convolution with its BatchNorm folded in, and ReLU.
struct StemConvolution {
  int64_t channels;  // output channels
  int64_t kernel_height, kernel_width, row_stride, column_stride, row_padding, column_padding;
  const float *weights, *bias;  // of pack_pointwise, with the depth in the order of RowConvolution's runs
};

struct StemData {
  // x (N, C, H, W) with any strides, in floats.
  const float* x;
  int64_t batch, channels, height, width;
  int64_t image, channel, row, pixel;
  std::vector<StemConvolution> convolutions;
  bool pools;  // 3x3 pixels, at every second one, with a padding of 1
  float* out;  // (N, H', W', C') without a gap
};

// H' or W' of one of the convolutions; below 1 where the kernel is larger than what it reads.
constexpr int64_t convolved_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
}
constexpr int64_t pooled_size(int64_t size) { return (size - 1) / 2 + 1; }

void run_stem(const StemData& data, const Kernels& kernels);

}  // namespace res2net_fused
