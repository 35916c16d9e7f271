// Direct convolution of a run of pixels: what the direct chain and the repair of Winograd tiles share.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "panels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {

// Output pixels side by side in one row, for the output channels of one panel pass. Pitches in floats.
struct PixelRun {
  const float* source;    // what the upper left tap reads for the first pixel
  const float* next_row;  // the same for the next row
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

// y = act(z) and the sum behind it, for activations that do not clamp, from z.
void activate_run(const PixelRun& run, const float* z, int64_t z_pixel);

}  // namespace res2net_fused::RES2NET_FUSED_ISA
