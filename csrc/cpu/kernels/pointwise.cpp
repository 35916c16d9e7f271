// 1x1 convolutions: rows of pixels times packed weights, with bias, shortcut and ReLU while the sums are in registers.
//
//             depth                    one pass of panels                     out
//   source  +-------+  kRows rows      +-----+                +-----+
//           |#######|  at a time,      |#####| kDepth rows    |#####|   relu(sums + bias + shortcut)
//           |#######|  for all passes  |#####| at a time,     |#####|
//           |       |                  |     | in L2          |     |
//           +-------+                  +-----+                +-----+
//
// Where the depth takes several blocks, the sums of the rows wait for the next one in a buffer of one pass's width.
#include "kernels.h"
#include "micro_gemm.h"
#include "panels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

constexpr int64_t kRows = 200;   // of pixels that share one reading of the weights: their block of source stays in L2
constexpr int64_t kDepth = 512;  // of source and weights: with the rows of one micro-kernel call, half of L1

// A block of depth, for the rows of one micro-kernel call and one pass of panels.
struct DepthBlock {
  const float *source, *weights, *half_weights;
  int64_t source_pitch, panel_pitch, depth;
  float* waiting;  // sums of the blocks before this one, and then also its own
  bool first, last;
};

// One vector of a pixel; lanes: of it that are output channels, if not all.
template <class V>
R2N_INLINE void finish(const Pointwise& p, V sum, const float* bias, const float* shortcut, float* out, int64_t lanes) {
  V y = sum + load<V>(bias);
  const bool part = lanes < kLanes<V>;
  if (shortcut != nullptr) y += part ? load_first<V>(shortcut, lanes) : load<V>(shortcut);
  if (p.relu) y = clamp_below(y, V{});
  part ? store_first(out, y, lanes) : store(out, y);
}

// Rows `row` ... row + P of one pass; channel: the pass's first.
template <int P, int Panels, bool HalfPanel>
__attribute__((noinline)) void multiply_rows(const Pointwise& p, const DepthBlock& from, int64_t row, int64_t channel) {
  constexpr int64_t kWidth = Panels * kPanel + (HalfPanel ? kUnit : 0);
  Sums<P, Panels, HalfPanel> sums;
  if (from.first) {
    clear(sums);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < P; i++) {
#pragma GCC unroll 8
      for (int f = 0; f < sums.kFull; f++) sums.full[i][f] = load<Full>(from.waiting + i * kWidth + f * kLanes<Full>);
      if constexpr (sums.kHalf) sums.half[i][0] = load<Half>(from.waiting + i * kWidth + Panels * kPanel);
    }
  }
  const float* bias = p.bias + channel;
  const float* shortcut = p.shortcut == nullptr ? nullptr : p.shortcut + row * p.shortcut_pitch + channel;
  float* out = p.out + row * p.out_pitch + channel;
  if (from.last) {
    // The products hide how long these take to come; out is fetched too, since a part of a pixel is written at a time.
#pragma GCC unroll 16
    for (int i = 0; i < P; i++) {
      for (int64_t at = 0; at < kWidth; at += kPanel) {
        if (shortcut != nullptr) __builtin_prefetch(shortcut + i * p.shortcut_pitch + at, 0);
        __builtin_prefetch(out + i * p.out_pitch + at, 1);
      }
    }
  }
  accumulate<false>(
      sums, from.source, from.source_pitch, from.weights, from.half_weights, from.panel_pitch, from.depth, nullptr);
  if (!from.last) {
#pragma GCC unroll 16
    for (int i = 0; i < P; i++) {
#pragma GCC unroll 8
      for (int f = 0; f < sums.kFull; f++) store(from.waiting + i * kWidth + f * kLanes<Full>, sums.full[i][f]);
      if constexpr (sums.kHalf) store(from.waiting + i * kWidth + Panels * kPanel, sums.half[i][0]);
    }
    return;
  }
  const int64_t present = p.full_vectors ? kWidth : p.columns - channel;
#pragma GCC unroll 16
  for (int i = 0; i < P; i++) {
    const auto vector = [&](auto sum, int64_t at) R2N_LAMBDA_INLINE {
      if (at < present) finish(p, sum, bias + at, shortcut == nullptr ? nullptr : shortcut + at, out + at, present - at);
    };
#pragma GCC unroll 8
    for (int f = 0; f < sums.kFull; f++) vector(sums.full[i][f], f * kLanes<Full>);
    if constexpr (sums.kHalf) vector(sums.half[i][0], Panels * kPanel);
    if (shortcut != nullptr) shortcut += p.shortcut_pitch;
    out += p.out_pitch;
  }
}

}  // namespace

void pointwise_rows(const Pointwise& p, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
  alignas(64) float waiting[kRows * kWidest];
  const Passes blocks = Passes::of(last - first, kRows);
  for (int64_t b = 0, block = first; b < blocks.count; block += blocks.rows(b), b++) {
    const int64_t rows = blocks.rows(b);
    for_each_pass(p.columns, first_panel, last_panel, [&](PanelPass pass) {
      with_pass_shape(pass, [&]<int Panels, bool HalfPanel>() R2N_LAMBDA_INLINE {
        constexpr int kMost = max_rows(vectors_of(Panels, HalfPanel));
        const Passes row_passes = Passes::of(rows, kMost);
        for (int s = 0; s < 2 && p.sources[s].depth > 0; s++) {
          const PointwiseSource& source = p.sources[s];
          const bool last_source = s == 1 || p.sources[1].depth == 0;
          const float* weights = source.weights + pass.first * kPanel * source.depth;
          const Passes depths = Passes::of(source.depth, kDepth);
          for (int64_t d = 0, k = 0; d < depths.count; k += depths.rows(d), d++) {
            DepthBlock from{};
            from.weights = weights + k * kPanel;
            from.half_weights = weights + Panels * source.depth * kPanel + k * kUnit;
            from.source_pitch = source.pitch;
            from.panel_pitch = source.depth * kPanel;
            from.depth = depths.rows(d);
            from.first = s == 0 && d == 0;
            from.last = last_source && d + 1 == depths.count;
            for (int64_t i = 0, row = 0; i < row_passes.count; row += row_passes.rows(i), i++) {
              from.source = source.data + (block + row) * source.pitch + k;
              from.waiting = waiting + row * kWidest;
              with_rows<kMost>(row_passes.rows(i), [&]<int P>() R2N_LAMBDA_INLINE {
                multiply_rows<P, Panels, HalfPanel>(p, from, block + row, pass.first * kPanel);
              });
            }
          }
        }
      });
    });
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
