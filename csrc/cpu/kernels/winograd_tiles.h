// A block's tiles in the order in which Winograd's products take them.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {

struct Tile {
  int64_t image, y, x;    // first output pixel
  int64_t rows, columns;  // of output pixels
};

// A block's tiles, sorted so that those which use a point follow each other, whatever the point. With two sizes in each
// dimension (rows x columns): class 0 is big x small, 1 big x big, 2 small x big, 3 small x small.
struct SortedTiles {
  Tile tile[kMaxBlockTiles];
  int64_t bound[5];  // class c is bound[c] ... bound[c + 1]
};

R2N_INLINE int64_t class_of(bool big_row, bool big_column) { return big_row ? (big_column ? 1 : 0) : (big_column ? 2 : 3); }

R2N_INLINE void sort_tiles(const TileGrid& grid, Block block, SortedTiles& sorted) {
  const int64_t columns = grid.columns.count(), per_image = grid.per_image();
  uint8_t classes[kMaxBlockTiles];
  Tile tiles[kMaxBlockTiles];
  int64_t counts[4] = {};
  int64_t image = block.first / per_image, row = block.first % per_image / columns, column = block.first % columns;
  for (int64_t t = 0; t < block.count; t++) {
    const bool big_row = grid.rows.is_big(row), big_column = grid.columns.is_big(column);
    tiles[t] = {
        image, grid.rows.start(row), grid.columns.start(column), big_row ? grid.rows.big : grid.rows.small,
        big_column ? grid.columns.big : grid.columns.small};
    classes[t] = static_cast<uint8_t>(class_of(big_row, big_column));
    counts[classes[t]]++;
    if (++column == columns) {
      column = 0;
      if (++row == grid.rows.count()) {
        row = 0;
        image++;
      }
    }
  }
  int64_t at[4];
  sorted.bound[0] = 0;
  for (int c = 0; c < 4; c++) {
    at[c] = sorted.bound[c];
    sorted.bound[c + 1] = sorted.bound[c] + counts[c];
  }
  for (int64_t t = 0; t < block.count; t++) sorted.tile[at[classes[t]]++] = tiles[t];
}

R2N_INLINE bool size_uses_point(int64_t size, int64_t i) { return size == 4 || i < 3 || i == 5 || (size == 3 && i == 3); }

struct TileRange {
  int64_t first, last;
};

// The sorted tiles that use point (i, j).
R2N_INLINE TileRange tiles_of_point(const TileGrid& grid, const SortedTiles& sorted, int64_t i, int64_t j) {
  TileRange range{0, 0};
  for (int c = 0; c < 4; c++) {
    const int64_t rows = c < 2 ? grid.rows.big : grid.rows.small;
    const int64_t columns = c == 1 || c == 2 ? grid.columns.big : grid.columns.small;
    if (sorted.bound[c] == sorted.bound[c + 1] || !size_uses_point(rows, i) || !size_uses_point(columns, j)) continue;
    if (range.last == 0) range.first = sorted.bound[c];
    range.last = sorted.bound[c + 1];
  }
  return range;
}

// Calls f.operator()<Rows, Columns>(tile, its place in V and M) for every tile.
template <class F>
R2N_INLINE void for_each_tile(const SortedTiles& sorted, const F& f) {
  for (int64_t t = 0; t < sorted.bound[4]; t++) {
    const Tile& tile = sorted.tile[t];
    switch (tile.rows * 8 + tile.columns) {
#define R2N_TILE(R, C)                    \
  case R * 8 + C:                         \
    f.template operator()<R, C>(tile, t); \
    break;
      R2N_TILE(4, 4)
      R2N_TILE(4, 3)
      R2N_TILE(3, 4)
      R2N_TILE(3, 3)
      R2N_TILE(4, 2)
      R2N_TILE(2, 4)
      R2N_TILE(3, 2)
      R2N_TILE(2, 3)
      R2N_TILE(2, 2)
#undef R2N_TILE
    }
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
