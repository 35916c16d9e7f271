// Direct 3x3 convolution, any stride, dilation and number of groups, over a source with zero borders.
//
//   source rows y*stride + ty*dilation            a run: pixels of one output row
//   +---+---+---+---+---+---+---+
//   |   |###|   |###|   |###|   |  ty = 0         P sums x panels stay in registers while nine taps
//   +---+---+---+---+---+---+---+                 pass by, each with `depth` rows of weights
//   |   |###|   |###|   |###|   |  ty = 1
//   +---+---+---+---+---+---+---+                 (drawn: one pixel's taps, dilation 2)
//   |   |###|   |###|   |###|   |  ty = 2
//   +---+---+---+---+---+---+---+
#include "direct_conv.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

template <class V>
R2N_INLINE void finish(const PixelRun& run, const Epilogue& activate, V sum, int64_t pixel, int64_t channel) {
  const int64_t lanes = run.channels - channel;
  if (lanes <= 0) return;
  const bool part = lanes < kLanes<V>;
  float* out = run.out + pixel * run.out_pixel + channel;
  const V y = activate(sum + load<V>(run.bias + channel));
  part ? store_first(out, y, lanes) : store(out, y);
  if (run.addend != nullptr) {
    const float* addend = run.addend + pixel * run.addend_pixel + channel;
    float* next = run.next + pixel * run.next_pixel + channel;
    const V u = y + (part ? load_first<V>(addend, lanes) : load<V>(addend));
    part ? store_first(next, u, lanes) : store(next, u);
  }
}

// Asks for the cache lines of a group's pixels, one at each call: what a tap reads for the next row. They come from far away,
// in short pieces that no prefetcher of the processor's follows.
class RowAhead {
 public:
  RowAhead(const float* from, int64_t pixel, int64_t channels) : pixel_at_(from), pixel_(pixel), channels_(channels) {}

  R2N_INLINE_MEMBER void ask() {
    __builtin_prefetch(pixel_at_ + channel_, 0, 2);
    channel_ += kLine;
    const bool ends = channel_ >= channels_;
    pixel_at_ += ends ? pixel_ : 0;
    channel_ = ends ? 0 : channel_;
  }

 private:
  static constexpr int64_t kLine = 16;  // floats

  const float* pixel_at_;
  int64_t pixel_, channels_, channel_ = 0;
};

template <int P, int Panels, bool HalfPanel>
__attribute__((noinline)) void run_pass(const PixelRun& run, int64_t first) {
  Sums<P, Panels, HalfPanel> sums;
  clear(sums);
  const float* source = run.source + first * run.source_pixel;
  const float* weights = run.weights;
  const int64_t panel_pitch = 9 * run.depth * kPanel;
  for (int ty = 0; ty < 3; ty++) {
    for (int tx = 0; tx < 3; tx++) {
      const int64_t tap = ty * 3 + tx;
      const int64_t at = ty * run.tap_row + tx * run.tap_column;
      RowAhead ahead(run.next_row + first * run.source_pixel + at, run.source_pixel, run.depth);
      accumulate(
          sums, source + at, run.source_pixel, weights + tap * run.depth * kPanel,
          weights + Panels * panel_pitch + tap * run.depth * kUnit, panel_pitch, run.depth,
          [&](int64_t) R2N_LAMBDA_INLINE { ahead.ask(); });
    }
  }
  const Epilogue activate = Epilogue::of(run.activation);
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
    for (int f = 0; f < sums.kFull; f++) finish(run, activate, sums.full[p][f], first + p, f * kLanes<Full>);
    if constexpr (sums.kHalf) finish(run, activate, sums.half(p), first + p, Panels * kPanel);
  }
}

void run_passes(const PixelRun& run, PanelPass pass) {
  with_pass_shape(pass, [&]<int Panels, bool HalfPanel>() {
    constexpr int kMost = max_rows(vectors_of(Panels, HalfPanel));
    const Passes passes = Passes::of(run.count, kMost);
    for (int64_t i = 0, first = 0; i < passes.count; i++) {
      with_rows<kMost>(passes.rows(i), [&]<int P>() { run_pass<P, Panels, HalfPanel>(run, first); });
      first += passes.rows(i);
    }
  });
}

constexpr int64_t kActivatedPixels = 32;  // at once, by activations that do not clamp

}  // namespace

void direct_run(const PixelRun& run, PanelPass pass) {
  if (run.activation.clamps()) return run_passes(run, pass);
  // Through memory of its own: tiles that are repaired may overlap, and what one thread has activated no other may see as z.
  alignas(64) float z[kActivatedPixels * kWidest];
  const int64_t width = pass.width();
  for (int64_t first = 0; first < run.count; first += kActivatedPixels) {
    PixelRun part = run;
    part.count = smaller(run.count - first, kActivatedPixels);
    part.source += first * run.source_pixel;
    part.next_row += first * run.source_pixel;
    part.out += first * run.out_pixel;
    if (run.addend != nullptr) {
      part.addend += first * run.addend_pixel;
      part.next += first * run.next_pixel;
    }
    PixelRun plain = part;
    plain.activation = {Activation::none};
    plain.addend = nullptr;
    plain.out = z;
    plain.out_pixel = width;
    run_passes(plain, pass);
    activate_run(part, z, width);
  }
}

void activate_run(const PixelRun& run, const float* z, int64_t z_pixel) {
  for (int64_t p = 0; p < run.count; p++) {
    for_channels(run.channels, [&]<bool Part>(int64_t c, int64_t lanes) R2N_LAMBDA_INLINE {
      const Full y = activated(load_some<Part, Full>(z + p * z_pixel + c, lanes), run.activation);
      store_some<Part>(run.out + p * run.out_pixel + c, y, lanes);
      if (run.addend == nullptr) return;
      const Full u = y + load_some<Part, Full>(run.addend + p * run.addend_pixel + c, lanes);
      store_some<Part>(run.next + p * run.next_pixel + c, u, lanes);
    });
  }
}

void direct_rows(const Step& step, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
  const int64_t group_channels = step.channels / step.groups, group_panels = panel_count(group_channels);
  PixelRun run{};
  run.source_pixel = step.stride * step.source.pixel;
  run.tap_row = step.row_dilation * step.source.row;
  run.tap_column = step.column_dilation * step.source.pixel;
  run.depth = group_channels;
  run.out_pixel = step.out.pixel;
  run.addend_pixel = step.addend.pixel;
  run.next_pixel = step.next.pixel;
  run.count = step.width;
  run.activation = step.activation;
  for (int64_t group = first_panel / group_panels; group * group_panels < last_panel; group++) {
    const int64_t skipped = group * group_panels;  // panels of the groups before
    const int64_t from = first_panel > skipped ? first_panel - skipped : 0;
    const int64_t to = smaller(last_panel - skipped, group_panels);
    const float* weights = step.direct + group * direct_group_floats(group_channels);
    for_each_pass(group_channels, from, to, [&](PanelPass pass) {
      const int64_t channel = group * group_channels + pass.first * kPanel;
      run.weights = weights + pass.first * 9 * group_channels * kPanel;
      run.bias = step.bias + channel;
      run.channels = smaller(group_channels - pass.first * kPanel, pass.width());
      for (int64_t row = first; row < last; row++) {
        const int64_t n = row / step.height, y = row % step.height;
        run.source = step.source.at(n, y * step.stride - step.row_dilation, -step.column_dilation) + group * group_channels;
        run.next_row = run.source + step.stride * step.source.row;
        run.out = step.out.at(n, y, 0) + channel;
        const bool adds = step.next.data != nullptr;
        run.addend = adds ? step.addend.at(n, y, 0) + channel : nullptr;
        run.next = adds ? step.next.at(n, y, 0) + channel : nullptr;
        direct_run(run, pass);
      }
    });
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
