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
#include "interface.h"
#include "micro_gemm.h"
#include "panels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

constexpr int64_t kRows = 96;    // of pixels that share one reading of the weights: their block of source stays in L2
constexpr int64_t kDepth = 512;  // of source and weights: with the rows of one micro-kernel call, half of L1
constexpr int64_t kWidest = kMaxPanels * kPanel + kUnit;

struct Sources {
  const float *source, *weights, *half_weights;
  int64_t depth;
  float* sums;      // those of the blocks of depth before this one, and then also its own
  bool first, last;  // block of depth
};

template <bool Part, class V>
R2N_INLINE void finish(const Pointwise& p, V sum, const float* bias, const float* shortcut, float* out, int64_t lanes) {
  V y = sum + load<V>(bias);
  if (shortcut != nullptr) y += load_some<Part, V>(shortcut, lanes);
  if (p.relu) y = clamp_below(y, V{});
  store_some<Part>(out, y, lanes);
}

// Rows `row` ... row + P of one pass; channel: the pass's first.
template <int P, int Panels, bool HalfPanel>
__attribute__((noinline)) void multiply_rows(const Pointwise& p, const Sources& from, int64_t row, int64_t channel) {
  constexpr int64_t kWidth = Panels * kPanel + (HalfPanel ? kUnit : 0);
  Sums<P, Panels, HalfPanel> sums;
  if (from.first) {
    clear(sums);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < P; i++) {
#pragma GCC unroll 8
      for (int f = 0; f < sums.kFull; f++) sums.full[i][f] = load<Full>(from.sums + i * kWidth + f * kLanes<Full>);
      if constexpr (sums.kHalf) sums.half[i][0] = load<Half>(from.sums + i * kWidth + Panels * kPanel);
    }
  }
  accumulate<false>(
      sums, from.source, p.source_pitch, from.weights, from.half_weights, p.depth * kPanel, from.depth, nullptr);
  if (!from.last) {
#pragma GCC unroll 16
    for (int i = 0; i < P; i++) {
#pragma GCC unroll 8
      for (int f = 0; f < sums.kFull; f++) store(from.sums + i * kWidth + f * kLanes<Full>, sums.full[i][f]);
      if constexpr (sums.kHalf) store(from.sums + i * kWidth + Panels * kPanel, sums.half[i][0]);
    }
    return;
  }
  const float* bias = p.bias + channel;
  const float* shortcut = p.shortcut == nullptr ? nullptr : p.shortcut + row * p.shortcut_pitch + channel;
  float* out = p.out + row * p.out_pitch + channel;
  const int64_t present = p.columns - channel;
  const bool part = present < kWidth && !p.full_vectors;
#pragma GCC unroll 16
  for (int i = 0; i < P; i++) {
#pragma GCC unroll 8
    for (int f = 0; f < sums.kFull; f++) {
      constexpr int64_t kStep = kLanes<Full>;
      const int64_t lanes = present - f * kStep;
      if (part && lanes < kStep) {
        if (lanes > 0) finish<true>(p, sums.full[i][f], bias + f * kStep, shortcut ? shortcut + f * kStep : nullptr, out + f * kStep, lanes);
      } else {
        finish<false>(p, sums.full[i][f], bias + f * kStep, shortcut ? shortcut + f * kStep : nullptr, out + f * kStep, kStep);
      }
    }
    if constexpr (sums.kHalf) {
      constexpr int64_t kAt = Panels * kPanel;
      const int64_t lanes = present - kAt;
      if (part && lanes < kUnit) {
        if (lanes > 0) finish<true>(p, sums.half[i][0], bias + kAt, shortcut ? shortcut + kAt : nullptr, out + kAt, lanes);
      } else {
        finish<false>(p, sums.half[i][0], bias + kAt, shortcut ? shortcut + kAt : nullptr, out + kAt, kUnit);
      }
    }
    if (shortcut != nullptr) shortcut += p.shortcut_pitch;
    out += p.out_pitch;
  }
}

}  // namespace

void pointwise_rows(const Pointwise& p, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
  alignas(64) float waiting[kRows * kWidest];
  const Passes depths = Passes::of(p.depth, kDepth);
  for (int64_t block = first; block < last; block += kRows) {
    const int64_t end = smaller(block + kRows, last);
    for_each_pass(p.columns, first_panel, last_panel, [&](PanelPass pass) {
      with_pass_shape(pass, [&]<int Panels, bool HalfPanel>() R2N_LAMBDA_INLINE {
        constexpr int kMost = max_rows(vectors_of(Panels, HalfPanel));
        const float* weights = p.weights + pass.first * kPanel * p.depth;
        int64_t k = 0;
        for (int64_t d = 0; d < depths.count; d++) {
          const Passes passes = Passes::of(end - block, kMost);
          int64_t row = block;
          for (int64_t i = 0; i < passes.count; i++) {
            const Sources from{
                p.source + row * p.source_pitch + k, weights + k * kPanel,
                weights + Panels * p.depth * kPanel + k * kUnit, depths.rows(d),
                waiting + (row - block) * kWidest, d == 0, d + 1 == depths.count};
            with_rows<kMost>(passes.rows(i), [&]<int P>() R2N_LAMBDA_INLINE {
              multiply_rows<P, Panels, HalfPanel>(p, from, row, pass.first * kPanel);
            });
            row += passes.rows(i);
          }
          k += depths.rows(d);
        }
      });
    });
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
