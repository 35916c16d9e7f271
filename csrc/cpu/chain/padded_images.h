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

// Zeros `rows` rows above and below each image and `columns` pixels beside it; memory: the first image's upper left corner.
inline void zero_around(
    float* memory, int64_t images, int64_t height, int64_t width, int64_t rows, int64_t columns, int64_t pixel) {
  const int64_t row = (width + 2 * columns) * pixel;
  const auto clear = [](float* from, int64_t floats) { std::memset(from, 0, static_cast<size_t>(floats) * sizeof(float)); };
  for (int64_t n = 0; n < images; n++, memory += (height + 2 * rows) * row) {
    clear(memory, rows * row + columns * pixel);
    // From the end of one row to the beginning of the next one, and last to the image's end.
    for (int64_t y = 0; y < height; y++) {
      const bool last = y + 1 == height;
      clear(memory + (rows + y + 1) * row - columns * pixel, columns * pixel + (last ? rows * row : columns * pixel));
    }
  }
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
    for (float* from : {memory_, memory_ + one()}) {
      zero_around(from, images_, problem_.height, problem_.width, rows, columns, pixel_);
    }
  }

  // The source of convolution i, from its first pixel inside the border.
  View view(int64_t i) const {
    const int64_t border = problem_.row_dilation() * row_ + problem_.column_dilation() * pixel_;
    return {memory_ + (i % 2) * one() + border, image_, row_, pixel_};
  }

 private:
  int64_t one() const { return round_up(images_ * image_, kAlignment); }

  const ChainProblem& problem_;
  int64_t images_, pixel_, row_, image_;
  float* memory_ = nullptr;
};

}  // namespace res2net_fused
