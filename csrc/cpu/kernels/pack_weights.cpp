// Weights (w, w/groups, 3, 3) into the panels that the kernels read: 16 output channels side by side, then 8.
//
//   weights[o][k][3][3]                        packed, one panel: k rows of 16 channels
//     o = 0 ... 15   ---------------------->     k = 0: o0 o1 ... o15
//                     for each point or tap      k = 1: o0 o1 ... o15
#include "kernels.h"
#include "micro_gemm.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

// G g: 3 taps to the 6 points.
template <class V>
R2N_INLINE void weight_points(const V* g, V* o) {
  const V sixth = broadcast<V>(1.0f / 6), twelfth = broadcast<V>(1.0f / 12), twentyfourth = broadcast<V>(1.0f / 24);
  const V even = (g[0] + g[2]) * -sixth, even2 = multiply_add(g[0], twentyfourth, g[2] * sixth);
  o[0] = broadcast<V>(0.25f) * g[0];
  o[1] = multiply_add(g[1], -sixth, even);
  o[2] = multiply_add(g[1], sixth, even);
  o[3] = multiply_add(g[1], twelfth, even2);
  o[4] = multiply_add(g[1], -twelfth, even2);
  o[5] = g[2];
}

// G g G^T for one vector of output channels: its taps, `pitch` floats from one to the next.
template <class V>
R2N_INLINE void pack_points(const float* taps, int64_t pitch, float* to, int64_t point) {
  V half[6][3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; j++) {
    const V column[3] = {load<V>(taps + j * pitch), load<V>(taps + (3 + j) * pitch), load<V>(taps + (6 + j) * pitch)};
    V points[6];
    weight_points(column, points);
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) half[i][j] = points[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < 6; i++) {
    V points[6];
    weight_points(half[i], points);
#pragma GCC unroll 6
    for (int j = 0; j < 6; j++) store(to + (i * 6 + j) * point, points[j]);
  }
}

// Four rows, `from_pitch` floats apart, to four columns of `to`.
R2N_INLINE void transpose4(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  const Vec4 a = load<Vec4>(from), b = load<Vec4>(from + from_pitch);
  const Vec4 c = load<Vec4>(from + 2 * from_pitch), d = load<Vec4>(from + 3 * from_pitch);
  const Vec4 ac0 = R2N_SHUFFLE(a, c, 0, 4, 1, 5), ac1 = R2N_SHUFFLE(a, c, 2, 6, 3, 7);
  const Vec4 bd0 = R2N_SHUFFLE(b, d, 0, 4, 1, 5), bd1 = R2N_SHUFFLE(b, d, 2, 6, 3, 7);
  store(to, R2N_SHUFFLE(ac0, bd0, 0, 4, 1, 5));
  store(to + to_pitch, R2N_SHUFFLE(ac0, bd0, 2, 6, 3, 7));
  store(to + 2 * to_pitch, R2N_SHUFFLE(ac1, bd1, 0, 4, 1, 5));
  store(to + 3 * to_pitch, R2N_SHUFFLE(ac1, bd1, 2, 6, 3, 7));
}

// The taps of one input channel to taps[tap][panel's output channels]; zeros for those behind `present`.
R2N_INLINE void gather_taps(const WeightView& weights, const float* from, int64_t width, int64_t present, float* taps) {
  const bool forwards = weights.row == 3 && weights.column == 1, backwards = weights.row == -3 && weights.column == -1;
  if (present == width && (forwards || backwards)) {  // nine taps side by side
    const float* first = forwards ? from : from - 8;
    float* const to = forwards ? taps : taps + 8 * kPanel;
    const int64_t step = forwards ? kPanel : -kPanel;
    for (int64_t lane = 0; lane < width; lane += 4) {
      const float* rows = first + lane * weights.output;
      transpose4(rows, weights.output, to + lane, step);
      transpose4(rows + 4, weights.output, to + 4 * step + lane, step);
      for (int64_t i = 0; i < 4; i++) to[8 * step + lane + i] = rows[i * weights.output + 8];
    }
    return;
  }
  for (int64_t i = 0; i < 3; i++) {
    for (int64_t j = 0; j < 3; j++) {
      float* const to = taps + (i * 3 + j) * kPanel;
      const float* row = from + i * weights.row + j * weights.column;
      for (int64_t lane = 0; lane < present; lane++) to[lane] = row[lane * weights.output];
      for (int64_t lane = present; lane < width; lane++) to[lane] = 0;
    }
  }
}

constexpr int64_t kGathered = 8;  // input channels: what is stored in pieces is read whole only when it has left for the cache

}  // namespace

void pack_winograd(
    const WeightView& weights, int64_t channels, float* packed, int64_t point, int64_t first_panel, int64_t last_panel) {
  const int64_t padded = round_up(channels, kUnit);
  float taps[kGathered][9 * kPanel];
  for (int64_t panel = first_panel; panel < last_panel; panel++) {
    const int64_t output = panel * kPanel, width = smaller(padded - output, kPanel);
    const int64_t present = smaller(channels - output, width);
    float* const to = packed + (panel - first_panel) * kPanel * channels;
    for (int64_t first = 0; first < channels; first += kGathered) {
      const int64_t count = smaller(channels - first, kGathered);
      for (int64_t k = 0; k < count; k++) {
        const float* from = weights.data + output * weights.output + (first + k) * weights.input;
        gather_taps(weights, from, width, present, taps[k]);
      }
      for (int64_t k = 0; k < count; k++) {
        float* const row = to + (first + k) * width;
        int64_t lane = 0;
        for (; lane + kLanes<Full> <= width; lane += kLanes<Full>) {
          pack_points<Full>(taps[k] + lane, kPanel, row + lane, point);
        }
        if constexpr (kHalfVectors) {
          if (lane < width) pack_points<Half>(taps[k] + lane, kPanel, row + lane, point);
        }
      }
    }
  }
}

namespace {

// One panel: `taps` blocks of `depth` rows of `width` output channels, of which `present` exist. from: (output, depth, taps).
void pack_panel(const float* from, int64_t present, int64_t width, int64_t depth, int64_t taps, float* to) {
  for (int64_t tap = 0; tap < taps; tap++) {
    for (int64_t k = 0; k < depth; k++) {
      for (int64_t lane = 0; lane < width; lane++) {
        *to++ = lane < present ? from[(lane * depth + k) * taps + tap] : 0.0f;
      }
    }
  }
}

}  // namespace

void pack_direct(
    const float* weights, int64_t channels, int64_t groups, float* packed, int64_t first_panel, int64_t last_panel) {
  const int64_t group_channels = channels / groups, group_panels = panel_count(group_channels);
  const int64_t padded = round_up(group_channels, kUnit);
  for (int64_t i = first_panel; i < last_panel; i++) {
    const int64_t group = i / group_panels, output = i % group_panels * kPanel;
    const float* from = weights + (group * group_channels + output) * group_channels * 9;
    float* to = packed + group * direct_group_floats(group_channels) + output * 9 * group_channels;
    pack_panel(from, smaller(group_channels - output, kPanel), smaller(padded - output, kPanel), group_channels, 9, to);
  }
}

void pack_pointwise(
    const float* weights, int64_t columns, int64_t depth, float* packed, int64_t first_panel, int64_t last_panel) {
  const int64_t padded = round_up(columns, kUnit);
  for (int64_t output = first_panel * kPanel; output < smaller(last_panel * kPanel, padded); output += kPanel) {
    const int64_t present = smaller(columns - output, kPanel), width = smaller(padded - output, kPanel);
    pack_panel(weights + output * depth, present, width, depth, 1, packed + output * depth);
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
