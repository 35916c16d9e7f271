// The innermost loops: P rows of A times up to a few panels of packed weights, all sums in registers.
//
//                   B: panel 0     panel 1   ...  half panel
//                   k [16 floats]  [16]           [8]           one row of weights for each k, side by side in memory
//        A      +-----------------------------------------+
//   row 0  k -> |  full[0][0]    full[0][1]    half[0][0] |    each A value is broadcast and meets every vector of B
//   row 1  k -> |  full[1][0]    full[1][1]    half[1][0] |
//   ...         |                                         |
//   row P-1     +-----------------------------------------+
//
// Row counts are chosen so that sums, one row of B and a broadcast fit the registers.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {

constexpr int kPerPanel = kPanel / kLanes<Full>;                   // full vectors in a panel
constexpr bool kHalfVectors = kLanes<Half> < kLanes<Full>;         // whether a half panel has a vector type of its own
constexpr int kPerHalf = kHalfVectors ? 0 : kUnit / kLanes<Full>;  // else: full vectors in a half panel

// Panels that one pass takes at most: as many as leave room for enough rows.
constexpr int kMaxPanels = kRegisters == 32 ? (kPerPanel == 1 ? 3 : 1) : 1;

constexpr int vectors_of(int panels, bool half) { return panels * kPerPanel + (half ? (kHalfVectors ? 1 : kPerHalf) : 0); }

// The most rows for so many vectors side by side, within the registers left beside a row of B.
constexpr int max_rows(int vectors) {
  const int rows = (kRegisters - vectors - 1) / vectors;
  return rows > 12 ? 12 : rows < 1 ? 1 : rows;
}

template <int P, int Panels, bool HalfPanel>
struct Sums {
  static constexpr int kFull = Panels * kPerPanel + (HalfPanel ? kPerHalf : 0);
  static constexpr int kHalf = HalfPanel && kHalfVectors ? 1 : 0;
  Full full[P][kFull ? kFull : 1];
  Full wide_half[P][kHalf ? kHalf : 1];

  R2N_INLINE_MEMBER Half half(int row) const { return first_half(wide_half[row][0]); }
};

template <int P, int Panels, bool HalfPanel>
R2N_INLINE void clear(Sums<P, Panels, HalfPanel>& sums) {
  using S = Sums<P, Panels, HalfPanel>;
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
    for (int f = 0; f < S::kFull; f++) sums.full[p][f] = Full{};
    if constexpr (S::kHalf > 0) sums.wide_half[p][0] = Full{};
  }
}

// Sums that wait in memory, (P, pass's width), for more to be added to them.
template <int P, int Panels, bool HalfPanel>
R2N_INLINE void resume(Sums<P, Panels, HalfPanel>& sums, const float* waiting) {
  constexpr int64_t kWidth = Panels * kPanel + (HalfPanel ? kUnit : 0);
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
    for (int f = 0; f < sums.kFull; f++) sums.full[p][f] = load<Full>(waiting + p * kWidth + f * kLanes<Full>);
    if constexpr (sums.kHalf) sums.wide_half[p][0] = load_half(waiting + p * kWidth + Panels * kPanel);
  }
}

template <int P, int Panels, bool HalfPanel>
R2N_INLINE void suspend(const Sums<P, Panels, HalfPanel>& sums, float* waiting) {
  constexpr int64_t kWidth = Panels * kPanel + (HalfPanel ? kUnit : 0);
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
    for (int f = 0; f < sums.kFull; f++) store(waiting + p * kWidth + f * kLanes<Full>, sums.full[p][f]);
    if constexpr (sums.kHalf) store(waiting + p * kWidth + Panels * kPanel, sums.half(p));
  }
}

// sums += A (P rows, `row_pitch` floats apart) * B (depth rows; full panels at b, `panel_pitch` floats apart; half one at
// half). Calls ask(k) at each row of B, for prefetches that would be too many at once.
template <int P, int Panels, bool HalfPanel, class Ask>
R2N_INLINE void accumulate(
    Sums<P, Panels, HalfPanel>& sums, const float* a, int64_t row_pitch, const float* b, const float* half, int64_t panel_pitch,
    int64_t depth, const Ask& ask) {
  constexpr int kFull = Sums<P, Panels, HalfPanel>::kFull;
  const float* rows[(P + 2) / 3];  // every third row: the two behind it are reached by the addressing mode
#pragma GCC unroll 8
  for (int i = 0; i < (P + 2) / 3; i++) rows[i] = a + 3 * i * row_pitch;
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++) {
    Full row[kFull ? kFull : 1];
    Full row_half{};
#pragma GCC unroll 8
    for (int f = 0; f < kFull; f++) {
      const bool in_half = f >= Panels * kPerPanel;
      const float* from = in_half ? half + (f - Panels * kPerPanel) * kLanes<Full>
                                  : b + (f / kPerPanel) * panel_pitch + (f % kPerPanel) * kLanes<Full>;
      row[f] = load<Full>(from);
    }
    if constexpr (Sums<P, Panels, HalfPanel>::kHalf) row_half = load_half(half);
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) {
      const float x = rows[p / 3][(p % 3) * row_pitch];
#pragma GCC unroll 8
      for (int f = 0; f < kFull; f++) sums.full[p][f] = multiply_add(broadcast<Full>(x), row[f], sums.full[p][f]);
      if constexpr (Sums<P, Panels, HalfPanel>::kHalf) {
        sums.wide_half[p][0] = multiply_add(broadcast<Full>(x), row_half, sums.wide_half[p][0]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < (P + 2) / 3; i++) rows[i]++;
    ask(k);
    b += kPanel;
    half += kUnit;
  }
}

constexpr auto kAskNothing = [](int64_t) R2N_LAMBDA_INLINE {};

// sums += A^T * B over `depth` rows of both: P floats side by side at a, a few panels at b.
template <int P, int Panels, bool HalfPanel>
R2N_INLINE void accumulate_transposed(
    Sums<P, Panels, HalfPanel>& sums, const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, int64_t depth) {
  constexpr int kFull = Sums<P, Panels, HalfPanel>::kFull;
  for (int64_t k = 0; k < depth; k++) {
    Full row[kFull ? kFull : 1];
    Full row_half{};
#pragma GCC unroll 8
    for (int f = 0; f < kFull; f++) row[f] = load<Full>(b + f * kLanes<Full>);
    if constexpr (Sums<P, Panels, HalfPanel>::kHalf) row_half = load_half(b + kFull * kLanes<Full>);
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
      for (int f = 0; f < kFull; f++) sums.full[p][f] = multiply_add(broadcast<Full>(a[p]), row[f], sums.full[p][f]);
      if constexpr (Sums<P, Panels, HalfPanel>::kHalf) {
        sums.wide_half[p][0] = multiply_add(broadcast<Full>(a[p]), row_half, sums.wide_half[p][0]);
      }
    }
    a += a_pitch;
    b += b_pitch;
  }
}

// Rows are cut into passes of nearly equal size, so that no pass is left with a single row.
struct Passes {
  int64_t count, base, longer;

  static R2N_INLINE_MEMBER Passes of(int64_t rows, int64_t most) {
    const int64_t count = (rows + most - 1) / most;
    return {count, rows / count, rows % count};
  }
  R2N_INLINE_MEMBER int64_t rows(int64_t pass) const { return base + (pass < longer); }
};

}  // namespace res2net_fused::RES2NET_FUSED_ISA
