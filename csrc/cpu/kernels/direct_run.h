// Direct convolution of a run of pixels: what the direct chain and the repair of Winograd tiles share.
#pragma once

#include "interface.h"
#include "panels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {

// Output pixels side by side in one row, for the output channels of one panel pass. Pitches in floats.
struct PixelRun {
  const float* source;  // what the upper left tap reads for the first pixel
  int64_t source_pixel, tap_row, tap_column;
  int64_t depth;         // input channels
  const float* weights;  // the pass's first panel
  const float* bias;
  float* out;
  int64_t out_pixel;
  const float* addend;  // null where there is no next source
  int64_t addend_pixel;
  float* next;
  int64_t next_pixel;
  int64_t count;     // pixels
  int64_t channels;  // output channels to write, from the pass's first
  Activation activation;
};

void direct_run(const PixelRun& run, PanelPass pass);

// y = activation(sum + bias), keeping NaN.
struct Epilogue {
  float low, high;
  bool clamps_above;

  static R2N_INLINE_MEMBER Epilogue of(Activation activation) {
    const float infinity = __builtin_inff();
    return {
        activation == Activation::none ? -infinity : 0.0f, activation == Activation::hardtanh20 ? 20.0f : infinity,
        activation == Activation::hardtanh20};
  }

  template <class V>
  R2N_INLINE_MEMBER V operator()(V y) const {
    y = clamp_below(y, broadcast<V>(low));
    return clamps_above ? clamp_above(y, broadcast<V>(high)) : y;
  }
};

}  // namespace res2net_fused::RES2NET_FUSED_ISA
