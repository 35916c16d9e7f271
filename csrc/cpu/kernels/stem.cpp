// What stands in front of a network's blocks, a row of pixels at a time: a convolution with ReLU, and the max pooling behind it.
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
//
//   pooled:  max of 3 rows at each column, then of columns 2x - 1, 2x, 2x + 1; the last of them serves the next pixel too
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

// The larger one of each lane; NaN of either, as PyTorch's pooling has it.
template <class V>
R2N_INLINE V larger(V a, V b) {
  const V found = a > b ? a : b;  // b where they cannot be compared
  return a == a ? found : a;
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

void pool_row(const float* const* rows, int64_t in_pixels, int64_t channels, float* out) {
  for_channels(channels, [&]<bool Part>(int64_t c, int64_t lanes) {
    const auto column = [&](int64_t x) R2N_LAMBDA_INLINE {
      const auto at = [&](int row) R2N_LAMBDA_INLINE { return load_some<Part, Full>(rows[row] + x * channels + c, lanes); };
      return larger(larger(at(0), at(1)), at(2));
    };
    Full before = column(0);
    for (int64_t x = 0; x < in_pixels; x += 2) {
      const Full here = column(x), behind = x + 1 < in_pixels ? column(x + 1) : here;
      store_some<Part>(out + x / 2 * channels + c, larger(larger(before, here), behind), lanes);
      before = behind;
    }
  });
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
