// A convolution with ReLU in front of a network's blocks, a row of pixels at a time.
//
//   source rows, with zeros on both sides           weights, for one pass of panels
//        step     step                                       +-----+
//      |------->|------->|                                   |#####|
//   +--[========]------------+  a run: the channels under    |#####|  one row of 16 for each float of a run,
//   +--[========]------------+  one row of the kernel        |#####|  the kernel's rows one after the other
//   +--[========]------------+                               +-----+
//
// A run lies in memory as its weights do, and the next pixel's begins `step` floats further: pixels are multiplied where they
// are, and no patch of them is copied.
#include "kernels.h"
#include "micro_gemm.h"
#include "panels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

// Output channels of one pass. Pixels begin at `first`.
struct RowPass {
  const float *weights, *bias;
  float* out;
  int64_t channels;  // that are stored
};

template <class V>
R2N_INLINE void rectify(const RowPass& pass, V sum, float* out, int64_t channel) {
  const int64_t lanes = pass.channels - channel;
  if (lanes <= 0) return;
  const V y = clamp_below(sum + load<V>(pass.bias + channel), V{});
  lanes < kLanes<V> ? store_first(out + channel, y, lanes) : store(out + channel, y);
}

template <int P, int Panels, bool HalfPanel>
__attribute__((noinline)) void
convolve_pixels(const RowConvolution& c, const float* const* rows, const RowPass& pass, int64_t first) {
  Sums<P, Panels, HalfPanel> sums;
  clear(sums);
  const int64_t panel_pitch = c.taps * c.run * kPanel;
  for (int64_t t = 0; t < c.taps; t++) {
    accumulate(
        sums, rows[t] + first * c.step, c.step, pass.weights + t * c.run * kPanel,
        pass.weights + Panels * panel_pitch + t * c.run * kUnit, panel_pitch, c.run, kAskNothing);
  }
  float* out = pass.out + first * c.columns;
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
    for (int f = 0; f < sums.kFull; f++) rectify(pass, sums.full[p][f], out, f * kLanes<Full>);
    if constexpr (sums.kHalf) rectify(pass, sums.half(p), out, Panels * kPanel);
    out += c.columns;
  }
}

}  // namespace

void convolve_row(const RowConvolution& c, const float* const* rows, float* out, int64_t pixels) {
  for_each_pass(c.columns, 0, panel_count(c.columns), [&](PanelPass panels) {
    with_pass_shape(panels, [&]<int Panels, bool HalfPanel>() {
      constexpr int kMost = max_rows(vectors_of(Panels, HalfPanel));
      const int64_t channel = panels.first * kPanel;
      const RowPass pass{
          c.weights + c.taps * c.run * channel, c.bias + channel, out + channel,
          smaller(c.columns - channel, panels.width())};
      const Passes passes = Passes::of(pixels, kMost);
      for (int64_t i = 0, first = 0; i < passes.count; first += passes.rows(i), i++) {
        with_rows<kMost>(passes.rows(i), [&]<int P>() { convolve_pixels<P, Panels, HalfPanel>(c, rows, pass, first); });
      }
    });
  });
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
