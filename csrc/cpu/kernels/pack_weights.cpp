// Weights (w, w/groups, 3, 3) into the panels that the kernels read: 16 output channels side by side, then 8.
//
//   weights[o][k][3][3]                        packed, one panel: k rows of 16 channels
//     o = 0 ... 15   ---------------------->     k = 0: o0 o1 ... o15
//                     for each point or tap      k = 1: o0 o1 ... o15
#include "interface.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

// G g G^T in double: (3, 3) to (6, 6) for `kUnit` output channels at once.
constexpr double kG[6][3] = {{1.0 / 4, 0, 0},
                             {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                             {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                             {1.0 / 24, 1.0 / 12, 1.0 / 6},
                             {1.0 / 24, -1.0 / 12, 1.0 / 6},
                             {0, 0, 1}};

typedef double Doubles __attribute__((vector_size(64)));

// By reference throughout: a vector wider than a register is not passed by value.
R2N_INLINE void weight_point(int i, const Doubles* g, Doubles& point) {
  point = i == 0 ? g[0] * kG[0][0] : i == 5 ? g[2] : g[0] * kG[i][0] + g[1] * kG[i][1] + g[2] * kG[i][2];
}

R2N_INLINE void store_floats(float* to, const Doubles& v) {
  for (int lane = 0; lane < kUnit; lane++) to[lane] = static_cast<float>(v[lane]);
}

}  // namespace

void pack_winograd(const float* weights, int64_t channels, float* packed, int64_t first_panel, int64_t last_panel) {
  const int64_t padded = round_up(channels, kUnit);
  for (int64_t panel = first_panel; panel < last_panel; panel++) {
    const int64_t width = smaller(padded - panel * kPanel, kPanel);
    for (int64_t k = 0; k < channels; k++) {
      for (int64_t unit = 0; unit < width; unit += kUnit) {
        const int64_t output = panel * kPanel + unit;
        Doubles g[9] = {};
        for (int64_t lane = 0; lane < smaller(kUnit, channels - output); lane++) {
          const float* from = weights + ((output + lane) * channels + k) * 9;
          for (int tap = 0; tap < 9; tap++) g[tap][lane] = from[tap];
        }
        float* to = packed + panel * kPanel * channels + k * width + unit;
        for (int i = 0; i < 6; i++) {
          Doubles row[3];
          for (int tx = 0; tx < 3; tx++) {
            const Doubles column[3] = {g[tx], g[3 + tx], g[6 + tx]};
            weight_point(i, column, row[tx]);
          }
          for (int j = 0; j < 6; j++) {
            Doubles point;
            weight_point(j, row, point);
            store_floats(to + (i * 6 + j) * channels * padded, point);
          }
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
