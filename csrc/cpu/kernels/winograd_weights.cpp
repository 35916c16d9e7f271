// The gradient of one convolution's weights over a block of tiles, by Winograd: the adjoint of the convolution in its weights.
//
//   dz                Z[36 points][tiles][w]            sums[36 points][k rows][o panel]       total[9 taps][k][o]
//   +----+  A dz A^T  +--------+   V (of u)^T x Z            +-----+        G^T sums G            +-----+
//   | 4x4| ---------> |tile x o|   ------------>             |k x o|        -------->             |  += |
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
    ConstView dz, int64_t channels, const Tile& tile, float* z, int64_t point, int64_t first, int64_t last) {
  const float* from = dz.at(tile.image, tile.y, tile.x);
  const int64_t row = dz.row, pixel = dz.pixel;
  for_each_vector(first, last, channels, [&](auto kind, int64_t channel, int64_t lanes) R2N_LAMBDA_INLINE {
    using V = decltype(kind);
    const float* d = from + channel;
    if (lanes < kLanes<V>) {
      const auto part = [&](int i, int j) R2N_LAMBDA_INLINE { return load_first<V>(d + i * row + j * pixel, lanes); };
      transform_gradient<Rows, Columns, V>(part, z + channel, point);
    } else {
      const auto whole = [&](int i, int j) R2N_LAMBDA_INLINE { return load<V>(d + i * row + j * pixel); };
      transform_gradient<Rows, Columns, V>(whole, z + channel, point);
    }
  });
}

template <int P, int Panels, bool HalfPanel>
__attribute__((noinline)) void multiply_tiles(
    const float* v, const float* z, int64_t pitch, int64_t tiles, float* c, int64_t c_pitch) {
  Sums<P, Panels, HalfPanel> sums;
  clear(sums);
  accumulate_transposed(sums, v, pitch, z, pitch, tiles);
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
    for (int f = 0; f < sums.kFull; f++) store(c + p * c_pitch + f * kLanes<Full>, sums.full[p][f]);
    if constexpr (sums.kHalf) store(c + p * c_pitch, sums.half[p][0]);
  }
}

// One vector of sums, `point` floats from point to point, onto that of the taps, `tap` floats apart.
template <class V>
R2N_INLINE void add_taps(const float* sums, int64_t point, float* total, int64_t tap) {
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
      store(to, load<V>(to) + taps[j]);
    }
  }
}

// The taps of one panel, all rows k.
template <int Panels, bool HalfPanel>
R2N_INLINE void panel_taps(
    const TileRange* ranges, int64_t channels, const float* v, const float* z, int64_t point, float* sums, float* total) {
  constexpr int kMost = max_rows(vectors_of(Panels, HalfPanel));
  constexpr int64_t kWidth = HalfPanel ? kUnit : kPanel;
  const int64_t padded = round_up(channels, kUnit);
  const Passes passes = Passes::of(channels, kMost);
  int64_t k = 0;
  for (int64_t i = 0; i < passes.count; i++) {
    const int64_t rows = passes.rows(i), sums_point = rows * kWidth;
    for (int64_t p = 0; p < kPoints; p++) {
      const TileRange range = ranges[p];  // an empty one leaves zeros
      const int64_t at = p * point + range.first * padded;
      with_rows<kMost>(rows, [&]<int P>() R2N_LAMBDA_INLINE {
        multiply_tiles<P, Panels, HalfPanel>(
            v + at + k, z + at, padded, range.last - range.first, sums + p * sums_point, kWidth);
      });
    }
    for (int64_t row = 0; row < rows; row++) {
      float* to = total + (k + row) * padded;
      int64_t c = 0;
      for (; c + kLanes<Full> <= kWidth; c += kLanes<Full>) {
        add_taps<Full>(sums + row * kWidth + c, sums_point, to + c, channels * padded);
      }
      if constexpr (kLanes<Half> < kLanes<Full>) {
        if (c < kWidth) add_taps<Half>(sums + row * kWidth + c, sums_point, to + c, channels * padded);
      }
    }
    k += rows;
  }
}

}  // namespace

void winograd_weights(
    ConstView dz, int64_t channels, const TileGrid& grid, Block block, const float* v, float* z, float* sums, float* total,
    int64_t first_panel, int64_t last_panel) {
  SortedTiles sorted;
  sort_tiles(grid, block, sorted);
  const int64_t padded = round_up(channels, kUnit), point = point_pitch(block.count, padded);
  const int64_t first = first_panel * kPanel, last = smaller(last_panel * kPanel, padded);
  for_each_tile(sorted, [&]<int Rows, int Columns>(const Tile& tile, int64_t t) {
    tile_gradient<Rows, Columns>(dz, channels, tile, z + t * padded, point, first, last);
  });
  TileRange ranges[kPoints];
  for (int64_t p = 0; p < kPoints; p++) ranges[p] = tiles_of_point(grid, sorted, p / 6, p % 6);
  for (int64_t c = first; c < last; c += kPanel) {
    if (last - c >= kPanel) {
      panel_taps<1, false>(ranges, channels, v, z + c, point, sums, total + c);
    } else {
      panel_taps<0, true>(ranges, channels, v, z + c, point, sums, total + c);
    }
  }
  // Point (1, 1) of Z is the sum of a tile's gradients: the bias's.
  float* const bias = total + 9 * channels * padded;
  for (int64_t t = 0; t < block.count; t++) {
    for (int64_t c = first; c < last; c++) bias[c] += z[7 * point + t * padded + c];
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
