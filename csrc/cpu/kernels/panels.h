// How a range of panels is cut into passes of the micro-kernel.
#pragma once

#include "kernels.h"
#include "micro_gemm.h"

namespace res2net_fused::RES2NET_FUSED_ISA {

// One pass: `full` panels of 16 output channels from panel `first` on, then one of 8 if `half`.
struct PanelPass {
  int64_t first, full;
  bool half;

  R2N_INLINE_MEMBER int64_t width() const { return full * kPanel + (half ? kUnit : 0); }
};

constexpr int64_t kWidest = kMaxPanels * kPanel + kUnit;  // of a pass

// A half panel shares a pass with full ones where that leaves rows enough to pay for each row of B.
constexpr bool kHalfJoins = max_rows(vectors_of(kMaxPanels, true)) >= 4;

// Calls f(PanelPass) for panels first ... last of a group of `channels` output channels, in passes of nearly equal width.
template <class F>
R2N_INLINE void for_each_pass(int64_t channels, int64_t first, int64_t last, const F& f) {
  const int64_t padded = round_up(channels, kUnit);
  const bool half = last * kPanel > padded;  // the range ends with the group's half panel
  const int64_t full = last - first - half;
  const int64_t passes = (full + kMaxPanels - 1) / kMaxPanels;
  for (int64_t i = 0, panel = first; i < passes; i++) {
    const int64_t width = full / passes + (i < full % passes);
    f(PanelPass{panel, width, half && kHalfJoins && i + 1 == passes});
    panel += width;
  }
  if (half && (!kHalfJoins || passes == 0)) f(PanelPass{last - 1, 0, true});
}

// Calls f.operator()<Panels, HalfPanel>() for the pass's shape.
template <class F>
R2N_INLINE void with_pass_shape(PanelPass pass, const F& f) {
  if (pass.half) {
    if (pass.full == 0) return f.template operator()<0, true>();
    if constexpr (kHalfJoins) {
      if (pass.full == 1) return f.template operator()<1, true>();
      if constexpr (kMaxPanels >= 2) {
        if (pass.full == 2) return f.template operator()<2, true>();
      }
      if constexpr (kMaxPanels >= 3) return f.template operator()<3, true>();
    }
    return;
  }
  if (pass.full == 1) return f.template operator()<1, false>();
  if constexpr (kMaxPanels >= 2) {
    if (pass.full == 2) return f.template operator()<2, false>();
  }
  if constexpr (kMaxPanels >= 3) return f.template operator()<3, false>();
}

// Calls f.operator()<P>() with P == rows; 1 <= rows <= Most <= 16.
template <int Most, class F>
R2N_INLINE void with_rows(int64_t rows, const F& f) {
  switch (rows) {
#define R2N_ROWS(P)                                      \
  case P:                                                \
    if constexpr (P <= Most) f.template operator()<P>(); \
    break;
    R2N_ROWS(1)
    R2N_ROWS(2)
    R2N_ROWS(3)
    R2N_ROWS(4)
    R2N_ROWS(5)
    R2N_ROWS(6)
    R2N_ROWS(7)
    R2N_ROWS(8)
    R2N_ROWS(9)
    R2N_ROWS(10)
    R2N_ROWS(11)
    R2N_ROWS(12)
    R2N_ROWS(13)
    R2N_ROWS(14)
    R2N_ROWS(15)
    R2N_ROWS(16)
#undef R2N_ROWS
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
