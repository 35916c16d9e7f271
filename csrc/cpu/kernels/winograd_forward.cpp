// One convolution of the chain over a block of tiles, by Winograd.
//
//   source             V[36 points][tiles][w]       M[36 points][tiles][one pass of panels]        out, next
//   +--------+  B^T d B   +--------+                    +-----+                A^T m A        +----+ y = act(. + bias)
//   | 6x6    | ---------> |+-------+-+  x U[point]      |+----+-+  --------------------------> | 4x4| -> its slot of out
//   |  pixels|            ||tile x w| |  ------------>  ||      | |                            +----+
//   +--------+            +| matrix | |  36 products    +|      | |                           y + x_next -> next source
//                          +--------+-+                  +------+-+
//
// V, M and one pass of U stay in the L2 cache. A tile whose result is not finite is computed again directly: Winograd mixes
// a tile's inputs, spreads one Inf or NaN over all of it, and overflows earlier than a convolution does.
#include "direct_conv.h"
#include "panels.h"
#include "winograd_tiles.h"
#include "winograd_transforms.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

// Copies a tile's source pixels, zeros where there are none, into patch[pixel][channel] for `lanes` channels from `channel`.
template <bool Part, class V>
R2N_INLINE void gather(const Step& step, const Tile& tile, int64_t channel, int64_t lanes, float* patch, int64_t patch_pixel) {
  for (int64_t i = 0; i < tile.rows + 2; i++) {
    for (int64_t j = 0; j < tile.columns + 2; j++) {
      const int64_t y = tile.y - 1 + i, x = tile.x - 1 + j;
      const bool inside = step.source_has_border || (y >= 0 && y < step.in_height && x >= 0 && x < step.in_width);
      V v{};
      if (inside) v = load_some<Part, V>(step.source.at(tile.image, y, x) + channel, lanes);
      store_some<Part>(patch + (i * (tile.columns + 2) + j) * patch_pixel, v, lanes);
    }
  }
}

template <int Rows, int Columns>
__attribute__((noinline)) void tile_input(
    const Step& step, const Tile& tile, float* v, const PointLayout& layout, int64_t first, int64_t last) {
  const bool inside = step.source_has_border ||
                      (tile.y >= 1 && tile.x >= 1 && tile.y + Rows < step.in_height && tile.x + Columns < step.in_width);
  for_each_vector(first, last, step.channels, [&](auto kind, int64_t channel, int64_t lanes) R2N_LAMBDA_INLINE {
    using V = decltype(kind);
    const bool part = lanes < kLanes<V> && !step.source_full_vectors;
    float patch[kPoints * kLanes<V>];
    const float* d = patch;
    int64_t row = (Columns + 2) * kLanes<V>, pixel = kLanes<V>;
    if (inside && !part) {
      d = step.source.at(tile.image, tile.y - 1, tile.x - 1) + channel;
      row = step.source.row;
      pixel = step.source.pixel;
    } else if (part) {
      memset(patch, 0, sizeof(patch));
      gather<true, V>(step, tile, channel, lanes, patch, kLanes<V>);
    } else {
      gather<false, V>(step, tile, channel, lanes, patch, kLanes<V>);
    }
    // In one place: of two, the compiler would contract one to other multiply-adds, and bits would tell where a tile was read.
    transform_input<Rows, Columns, V>(d, row, pixel, v + layout.at(channel), layout.point);
  });
}

// What goes to step.next: nothing, the sum with the addend, or that sum where the mask lets it through.
enum class Next { none, sum, masked };

template <int Rows, int Columns, bool Part, Next kNext, class V>
R2N_INLINE bool vector_output(
    const Step& step, const Tile& tile, const Epilogue& activate, const float* m, int64_t point, int64_t channel,
    int64_t lanes) {
  constexpr bool kAdds = kNext != Next::none, kMasks = kNext == Next::masked;
  const V bias = load<V>(step.bias + channel);
  // Copies: what `step` refers to could change with every store, as far as the compiler knows.
  const View out = step.out, next = step.next;
  const ConstView addend = step.addend, mask = step.mask;
  const Activation mask_activation = step.mask_activation;
  float* out_row = out.at(tile.image, tile.y, tile.x) + channel;
  const float* addend_row = kAdds ? addend.at(tile.image, tile.y, tile.x) + channel : nullptr;
  const float* mask_row = kMasks ? mask.at(tile.image, tile.y, tile.x) + channel : nullptr;
  float* next_row = kAdds ? next.at(tile.image, tile.y, tile.x) + channel : nullptr;
  V total{};  // finite only if every output is
  transform_output<Rows, Columns, V>(m, point, [&](int i, const V* outputs) R2N_LAMBDA_INLINE {
    V x[Columns], passed[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) {
      // All loads before the stores: x and out often lie equally in their pages, and a load that seems to follow a store
      // to its place waits for it.
      if constexpr (kAdds) x[j] = load_some<Part, V>(addend_row + j * addend.pixel, lanes);
      if constexpr (kMasks) passed[j] = load_some<Part, V>(mask_row + j * mask.pixel, lanes);
    }
#pragma GCC unroll 4
    for (int j = 0; j < Columns; j++) {
      total += outputs[j];
      const V y = activate(outputs[j] + bias);
      store_some<Part>(out_row + j * out.pixel, y, lanes);
      if constexpr (kMasks) {
        store(next_row + j * next.pixel, masked(y + x[j], passed[j], mask_activation));
      } else if constexpr (kAdds) {
        store(next_row + j * next.pixel, y + x[j]);
      }
    }
    out_row += out.row;
    if constexpr (kAdds) {
      addend_row += addend.row;
      next_row += next.row;
    }
    if constexpr (kMasks) mask_row += mask.row;
  });
  return all_finite(total);
}

template <int Rows, int Columns>
__attribute__((noinline)) bool tile_output(
    const Step& step, const Tile& tile, const Epilogue& activate, const float* m, int64_t point, PanelPass pass) {
  const int64_t first = pass.first * kPanel;
  const bool adds = step.next.data != nullptr;
  bool finite = true;
  const int64_t last = first + pass.width();
  for_each_vector(first, last, step.channels, [&](auto kind, int64_t channel, int64_t lanes) R2N_LAMBDA_INLINE {
    using V = decltype(kind);
    const bool part = lanes < kLanes<V> && !(step.out_full_vectors && (!adds || step.addend_full_vectors));
    const float* from = m + (channel - first);
    const auto output = [&]<bool Part, Next kNext>() R2N_LAMBDA_INLINE {
      finite &= vector_output<Rows, Columns, Part, kNext, V>(step, tile, activate, from, point, channel, lanes);
    };
    const auto output_to = [&]<Next kNext>() R2N_LAMBDA_INLINE {
      part ? output.template operator()<true, kNext>() : output.template operator()<false, kNext>();
    };
    if (!adds) {
      output_to.template operator()<Next::none>();
    } else if (step.mask.data == nullptr) {
      output_to.template operator()<Next::sum>();
    } else {
      output_to.template operator()<Next::masked>();
    }
  });
  return finite;
}

// Where row i of a tile and of one pass goes to, and what follows; without its source.
PixelRun row_of_tile(const Step& step, const Tile& tile, PanelPass pass, int64_t i) {
  const int64_t channel = pass.first * kPanel;
  PixelRun run{};
  run.out = step.out.at(tile.image, tile.y + i, tile.x) + channel;
  run.out_pixel = step.out.pixel;
  if (step.next.data != nullptr) {
    run.addend = step.addend.at(tile.image, tile.y + i, tile.x) + channel;
    run.addend_pixel = step.addend.pixel;
    run.next = step.next.at(tile.image, tile.y + i, tile.x) + channel;
    run.next_pixel = step.next.pixel;
  }
  run.count = tile.columns;
  run.channels = smaller(step.channels - channel, pass.width());
  run.activation = step.activation;
  return run;
}

// As tile_output, for activations that do not clamp. z goes through memory of its own: tiles may overlap, and what one thread
// has activated no other may see as z.
template <int Rows, int Columns>
bool tile_activated(const Step& step, const Tile& tile, const float* m, int64_t point, PanelPass pass) {
  alignas(64) float z[Rows * Columns * kWidest];
  const int64_t first = pass.first * kPanel, width = pass.width();
  Step plain = step;
  plain.channels -= first;
  plain.bias += first;
  plain.out = {z, 0, Columns * width, width};
  plain.out_full_vectors = true;
  plain.next = {};
  const Epilogue leave = Epilogue::of({Activation::none});
  if (!tile_output<Rows, Columns>(plain, {0, 0, 0, Rows, Columns}, leave, m, point, {0, pass.full, pass.half})) return false;
  for (int64_t i = 0; i < Rows; i++) activate_run(row_of_tile(step, tile, pass, i), z + i * Columns * width, width);
  return true;
}

// The tile's outputs of one pass by direct convolution.
__attribute__((noinline, cold)) void repair_tile(const Step& step, const Tile& tile, PanelPass pass, float* patch) {
  const int64_t w = step.channels;
  for_each_vector(0, round_up(w, kUnit), w, [&](auto kind, int64_t channel, int64_t lanes) {
    using V = decltype(kind);
    if (lanes < kLanes<V>) {
      gather<true, V>(step, tile, channel, lanes, patch + channel, w);
    } else {
      gather<false, V>(step, tile, channel, lanes, patch + channel, w);
    }
  });
  for (int64_t i = 0; i < tile.rows; i++) {
    PixelRun run = row_of_tile(step, tile, pass, i);
    run.source = run.next_row = patch + i * (tile.columns + 2) * w;
    run.source_pixel = run.tap_column = run.depth = w;
    run.tap_row = (tile.columns + 2) * w;
    run.weights = step.direct + pass.first * 9 * w * kPanel;
    run.bias = step.bias + pass.first * kPanel;
    direct_run(run, pass);
  }
}

// The tile's pixels of the group that passes the chain by. After the last convolution, whose stores spill into it.
void copy_passed(const Step& step, const Tile& tile) {
  for (int64_t i = 0; i < tile.rows; i++) {
    for (int64_t j = 0; j < tile.columns; j++) {
      const float* from = step.passed.at(tile.image, tile.y + i, tile.x + j);
      float* to = step.passed_out.at(tile.image, tile.y + i, tile.x + j);
      for_each_vector(0, round_up(step.channels, kUnit), step.channels, [&](auto kind, int64_t c, int64_t lanes) {
        using V = decltype(kind);
        if (lanes < kLanes<V>) {
          store_first(to + c, load_first<V>(from + c, lanes), lanes);
        } else {
          store(to + c, load<V>(from + c));
        }
      });
    }
  }
}

// With Soon floats of each panel at `soon_b`, and what a later call reads at `soon_a`, asked for at each row of b.
template <int Soon, int P, int Panels, bool HalfPanel>
__attribute__((noinline)) void multiply_rows(
    const float* a, int64_t a_pitch, const float* b, int64_t depth, float* c, const float* soon_a, const float* soon_b) {
  Sums<P, Panels, HalfPanel> sums;
  clear(sums);
  const int64_t panel_pitch = depth * kPanel;
  accumulate(sums, a, a_pitch, b, b + Panels * panel_pitch, panel_pitch, depth, [&](int64_t k) R2N_LAMBDA_INLINE {
    __builtin_prefetch(soon_a + k * kUnit);
    if constexpr (Soon > 0) {
#pragma GCC unroll 4
      for (int i = 0; i < Panels; i++) __builtin_prefetch(soon_b + i * panel_pitch + k * Soon, 0, 2);
    }
  });
  suspend(sums, c);
}

// M = V * U for one pass of panels, point by point.
template <int Panels, bool HalfPanel>
R2N_INLINE void multiply_points(
    const Step& step, const TileGrid& grid, const SortedTiles& sorted, Block block, const float* v, float* m, PanelPass pass,
    int64_t first_panel) {
  constexpr int kMost = max_rows(vectors_of(Panels, HalfPanel));
  const int64_t w = step.channels, padded = round_up(w, kUnit), width = pass.width();
  const int64_t v_point = PointLayout::tiles_first(block.count, w).point, m_point = point_pitch(block.count, width);
  const float* weights = step.winograd + (pass.first - first_panel) * kPanel * w;
  TileRange range = tiles_of_point(grid, sorted, 0, 0);  // every tile uses point 0
  for (int64_t point = 0; point < kPoints;) {
    TileRange next_range{};
    int64_t next = point + 1;
    for (; next < kPoints; next++) {
      next_range = tiles_of_point(grid, sorted, next / 6, next % 6);
      if (next_range.first < next_range.last) break;
    }
    // The weights of the next point, and after the last one of the next pass.
    const float* soon = weights + (next < kPoints ? next * step.winograd_point : width * w);
    const Passes passes = Passes::of(range.last - range.first, kMost);
    int64_t tile = range.first;
    for (int64_t i = 0; i < passes.count; i++) {
      const float* a = v + point * v_point + tile * padded;
      // V of the next point, of which another thread may have written a part.
      const float* soon_a = next < kPoints ? a + (next - point) * v_point : a;
      const float* b = weights + point * step.winograd_point;
      float* c = m + point * m_point + tile * width;
      with_rows<kMost>(passes.rows(i), [&]<int P>() R2N_LAMBDA_INLINE {
        // Half of them by each of two calls: more at a time than arrive would make the products wait.
        const float* const half = soon + i * (w / 2) * kPanel;
        passes.count == 1 ? multiply_rows<kPanel, P, Panels, HalfPanel>(a, padded, b, w, c, soon_a, soon)
        : i < 2           ? multiply_rows<kPanel / 2, P, Panels, HalfPanel>(a, padded, b, w, c, soon_a, half)
                          : multiply_rows<0, P, Panels, HalfPanel>(a, padded, b, w, c, soon_a, nullptr);
      });
      tile += passes.rows(i);
    }
    point = next;
    range = next_range;
  }
}

}  // namespace

void winograd_input(
    const Step& step, const TileGrid& grid, Block block, float* v, const PointLayout& layout, int64_t first, int64_t last) {
  SortedTiles sorted;
  sort_tiles(grid, block, sorted);
  for_each_tile(sorted, [&]<int Rows, int Columns>(const Tile& tile, int64_t t) {
    tile_input<Rows, Columns>(step, tile, v + t * layout.tile, layout, first, last);
  });
}

bool winograd_output(
    const Step& step, const TileGrid& grid, Block block, const float* v, float* m, float* patch, int64_t first_panel,
    int64_t last_panel) {
  SortedTiles sorted;
  sort_tiles(grid, block, sorted);
  const Epilogue activate = Epilogue::of(step.activation);
  const bool clamps = step.activation.clamps();
  bool right = true;
  for_each_pass(step.channels, first_panel, last_panel, [&](PanelPass pass) {
    const int64_t width = pass.width(), point = point_pitch(block.count, width);
    const bool last_pass = pass.first * kPanel + width >= step.channels;
    with_pass_shape(pass, [&]<int Panels, bool HalfPanel>() R2N_LAMBDA_INLINE {
      multiply_points<Panels, HalfPanel>(step, grid, sorted, block, v, m, pass, first_panel);
    });
    for_each_tile(sorted, [&]<int Rows, int Columns>(const Tile& tile, int64_t t) {
      const float* const from = m + t * width;
      const bool finite = clamps ? tile_output<Rows, Columns>(step, tile, activate, from, point, pass)
                                 : tile_activated<Rows, Columns>(step, tile, from, point, pass);
      if (!finite) {
        if (step.direct == nullptr) {
          right = false;
        } else {
          repair_tile(step, tile, pass, patch);
        }
      }
      if (last_pass && step.passed.data != nullptr) copy_passed(step, tile);
    });
  });
  return right;
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
