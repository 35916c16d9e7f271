// The gradient of one convolution's weights over a block of tiles, by Winograd: the adjoint of the convolution in its weights.
//
//   dz                Z[36 points][tiles][w]            sums[36 points][o rows][k panel]       total[o][9 taps][k]
//   +----+  A dz A^T  +--------+   Z^T x V (of u)            +-----+        G^T sums G            +-----+
//   | 4x4| ---------> |tile x o|   ------------>             |o x k|        -------->             |  += |
//   +----+            +--------+   36 products, over tiles   +-----+                              +-----+
//
// 36 products serve 16 pixels and 9 taps, a quarter of the multiplications. One panel of a few rows stays in the L1 cache.
#include "panels.h"
#include "winograd_tiles.h"
#include "winograd_transforms.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

template <int Rows, int Columns>
__attribute__((noinline)) void tile_gradient(
    ConstView dz, int64_t channels, const Tile& tile, float* z, const PointLayout& layout, int64_t first, int64_t last) {
  const float* from = dz.at(tile.image, tile.y, tile.x);
  const int64_t row = dz.row, pixel = dz.pixel;
  for_each_vector(first, last, channels, [&](auto kind, int64_t channel, int64_t lanes) R2N_LAMBDA_INLINE {
    using V = decltype(kind);
    const float* d = from + channel;
    if (lanes < kLanes<V>) {
      const auto part = [&](int i, int j) R2N_LAMBDA_INLINE { return load_first<V>(d + i * row + j * pixel, lanes); };
      transform_gradient<Rows, Columns, V>(part, z + layout.at(channel), layout.point);
    } else {
      const auto whole = [&](int i, int j) R2N_LAMBDA_INLINE { return load<V>(d + i * row + j * pixel); };
      transform_gradient<Rows, Columns, V>(whole, z + layout.at(channel), layout.point);
    }
  });
}

// Z^T V of one point: P output channels and one panel of input channels.
template <int P, int Panels, bool HalfPanel>
__attribute__((noinline)) void multiply_tiles(const float* z, const float* v, int64_t tiles, float* c, int64_t c_pitch) {
  Sums<P, Panels, HalfPanel> sums;
  clear(sums);
  accumulate_transposed(sums, z, kPanel, v, kPanel, tiles);
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
    for (int f = 0; f < sums.kFull; f++) store(c + p * c_pitch + f * kLanes<Full>, sums.full[p][f]);
    if constexpr (sums.kHalf) store(c + p * c_pitch, sums.half(p));
  }
}

// One vector of sums, `point` floats from point to point, to that of the taps, `tap` floats apart.
template <class V>
R2N_INLINE void store_taps(const float* sums, int64_t point, float* total, int64_t tap, bool add) {
  V half[3][6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; j++) {
    V column[6], taps[3];
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) column[i] = load<V>(sums + (i * 6 + j) * point);
    tap_points(column, taps);
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) half[i][j] = taps[i];
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; i++) {
    V taps[3];
    tap_points(half[i], taps);
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
      float* to = total + (i * 3 + j) * tap;
      store(to, add ? load<V>(to) + taps[j] : taps[j]);
    }
  }
}

// The taps of some output channels of one panel and one panel of input channels, at z, v and total.
template <int Panels, bool HalfPanel>
R2N_INLINE void panel_taps(
    const TileRange* ranges, int64_t padded, const float* v, const float* z, int64_t point, float* sums, float* total,
    int64_t rows, bool add) {
  constexpr int kVectors = vectors_of(Panels, HalfPanel), kFitting = (kRegisters - kVectors - 1) / kVectors;
  constexpr int kMost = kFitting > kWeightRows ? int{kWeightRows} : kFitting;
  constexpr int64_t kWidth = HalfPanel ? kUnit : kPanel;
  const Passes passes = Passes::of(rows, kMost);
  for (int64_t i = 0, o = 0; i < passes.count; i++) {
    const int64_t count = passes.rows(i), sums_point = count * kWidth;
    for (int64_t p = 0; p < kPoints; p++) {
      const TileRange range = ranges[p];  // an empty one leaves zeros
      const int64_t at = p * point + range.first * kPanel;
      with_rows<kMost>(count, [&]<int P>() R2N_LAMBDA_INLINE {
        multiply_tiles<P, Panels, HalfPanel>(z + at + o, v + at, range.last - range.first, sums + p * sums_point, kWidth);
      });
    }
    for (int64_t row = 0; row < count; row++) {
      float* to = total + (o + row) * 9 * padded;
      int64_t k = 0;
      for (; k + kLanes<Full> <= kWidth; k += kLanes<Full>) {
        store_taps<Full>(sums + row * kWidth + k, sums_point, to + k, padded, add);
      }
      if constexpr (kHalfVectors) {
        if (k < kWidth) store_taps<Half>(sums + row * kWidth + k, sums_point, to + k, padded, add);
      }
    }
    o += count;
  }
}

}  // namespace

void winograd_gradient(
    ConstView dz, int64_t channels, const TileGrid& grid, Block block, float* z, int64_t first, int64_t last) {
  SortedTiles sorted;
  sort_tiles(grid, block, sorted);
  const PointLayout layout = PointLayout::panels_first(block.count, channels);
  for_each_tile(sorted, [&]<int Rows, int Columns>(const Tile& tile, int64_t t) {
    tile_gradient<Rows, Columns>(dz, channels, tile, z + t * layout.tile, layout, first, last);
  });
}

void winograd_weight_gradient(
    int64_t channels, const TileGrid& grid, Block block, const float* v, const float* z, float* sums, float* total, float* bias,
    int64_t first, int64_t last, bool add) {
  SortedTiles sorted;
  sort_tiles(grid, block, sorted);
  const int64_t padded = round_up(channels, kUnit);
  const PointLayout layout = PointLayout::panels_first(block.count, channels);
  TileRange ranges[kPoints];
  for (int64_t p = 0; p < kPoints; p++) ranges[p] = tiles_of_point(grid, sorted, p / 6, p % 6);
  for (int64_t o = first; o < last; o += kPanel) {
    const float* const own = z + layout.at(o);
    const int64_t rows = smaller(last - o, kPanel);
    float* const to = total + (o - first) * 9 * padded;
    for (int64_t k = 0; k < padded; k += kPanel) {
      const float* const from = v + layout.at(k);
      if (padded - k >= kPanel) {
        panel_taps<1, false>(ranges, padded, from, own, layout.point, sums, to + k, rows, add);
      } else {
        panel_taps<0, true>(ranges, padded, from, own, layout.point, sums, to + k, rows, add);
      }
    }
    // Point (1, 1) of Z is the sum of a tile's gradients: the bias's.
    for (int64_t lane = 0; lane < rows; lane++) {
      float sum = add ? bias[o - first + lane] : 0.0f;
      for (int64_t t = 0; t < block.count; t++) sum += own[7 * layout.point + t * kPanel + lane];
      bias[o - first + lane] = sum;
    }
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
