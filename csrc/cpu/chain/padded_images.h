// What convolutions read: images of one group between zero borders, two of them taking turns.
#pragma once

#include <cstring>

#include "cpu/chain/problem.h"

namespace res2net_fused {

constexpr int64_t kAlignment = 16;  // floats: one cache line

inline ConstView constant(View view) { return {view.data, view.image, view.row, view.pixel}; }

// One group of so many channels, from an image on.
template <class V>
V group_of(V view, int64_t group, int64_t channels, int64_t first_image) {
  view.data += first_image * view.image + group * channels;
  return view;
}

// The sources u of some images: (images, H + 2*rows, W + 2*columns, padded w), so much border being zero.
class PaddedImages {
 public:
  PaddedImages(const ChainProblem& problem, int64_t images) : problem_(problem), images_(images) {
    pixel_ = problem.padded();
    row_ = (problem.width + 2 * problem.column_dilation()) * pixel_;
    image_ = (problem.height + 2 * problem.row_dilation()) * row_;
  }

  int64_t floats() const { return 2 * one(); }

  void place(float* memory) { memory_ = memory; }

  void zero_borders() const {
    const int64_t rows = problem_.row_dilation(), columns = problem_.column_dilation();
    for (int64_t i = 0; i < 2 * images_; i++) {
      float* image = memory_ + (i / images_) * one() + (i % images_) * image_;
      clear(image, rows * row_);
      clear(image + (problem_.height + rows) * row_, rows * row_);
      for (int64_t y = rows; y < problem_.height + rows; y++) {
        clear(image + y * row_, columns * pixel_);
        clear(image + y * row_ + (problem_.width + columns) * pixel_, columns * pixel_);
      }
    }
  }

  // The source of convolution i, from its first pixel inside the border.
  View view(int64_t i) const {
    const int64_t border = problem_.row_dilation() * row_ + problem_.column_dilation() * pixel_;
    return {memory_ + (i % 2) * one() + border, image_, row_, pixel_};
  }

 private:
  static void clear(float* from, int64_t floats) { std::memset(from, 0, static_cast<size_t>(floats) * sizeof(float)); }
  int64_t one() const { return round_up(images_ * image_, kAlignment); }

  const ChainProblem& problem_;
  int64_t images_, pixel_, row_, image_;
  float* memory_ = nullptr;
};

}  // namespace res2net_fused
