// What convolutions read: images of one group between zero borders, two of them taking turns.
#pragma once

#include <cstring>

#include "cpu/chain_problem.h"

namespace res2net_fused {

constexpr int64_t kAlignment = 16;  // floats: one cache line

inline ConstView constant(View view) { return {view.data, view.image, view.row, view.pixel}; }

// The sources u of some images: (images, H + 2*border, W + 2*border, padded w), the border zero.
class Sources {
 public:
  Sources(const ChainProblem& problem, int64_t images) : problem_(problem), images_(images) {
    pixel_ = problem.padded();
    row_ = (problem.width + 2 * problem.dilation) * pixel_;
    image_ = (problem.height + 2 * problem.dilation) * row_;
  }

  int64_t floats() const { return 2 * one(); }

  void place(float* memory) { memory_ = memory; }

  void zero_borders() const {
    const int64_t b = problem_.dilation;
    for (int64_t i = 0; i < 2 * images_; i++) {
      float* image = memory_ + (i / images_) * one() + (i % images_) * image_;
      clear(image, b * row_);
      clear(image + (problem_.height + b) * row_, b * row_);
      for (int64_t y = b; y < problem_.height + b; y++) {
        clear(image + y * row_, b * pixel_);
        clear(image + y * row_ + (problem_.width + b) * pixel_, b * pixel_);
      }
    }
  }

  // The source of convolution i, from its first pixel inside the border.
  View view(int64_t i) const {
    return {memory_ + (i % 2) * one() + problem_.dilation * (row_ + pixel_), image_, row_, pixel_};
  }

 private:
  static void clear(float* from, int64_t floats) { std::memset(from, 0, static_cast<size_t>(floats) * sizeof(float)); }
  int64_t one() const { return round_up(images_ * image_, kAlignment); }

  const ChainProblem& problem_;
  int64_t images_, pixel_, row_, image_;
  float* memory_ = nullptr;
};

}  // namespace res2net_fused
