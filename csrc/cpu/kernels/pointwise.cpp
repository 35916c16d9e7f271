// 1x1 convolutions: rows of pixels times packed weights, with bias, shortcut and ReLU while the sums are in registers.
//
//             depth                    one pass of panels                     out
//   source  +-------+  a block's rows  +-----+                +-----+
//           |#######|  for all passes  |#####| so many rows   |#####|   relu(sums + bias + shortcut)
//           |#######|                  |#####| at a time,     |#####|
//           |.......|                  |.....| in L2          |.....|   .: asked for while # is worked on, some bytes at
//           +-------+                  +-----+                +-----+      each row of weights
//
// Where the depth takes several blocks, the sums of the rows wait for the next one in a buffer of one pass's width.
#include "kernels.h"
#include "micro_gemm.h"
#include "panels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

constexpr int64_t kSoonBytes = 32;  // asked for at each row of weights: a cache line every 27 or more multiplications

// What is asked for during one call, kSoonBytes of each at a time.
struct Soon {
  const char *source, *weights, *outputs;
};

// Bytes that are asked for piece by piece.
class Region {
 public:
  Region() = default;
  Region(const float* from, int64_t floats)
      : at_(reinterpret_cast<const char*>(from)), left_(from == nullptr ? 0 : floats * static_cast<int64_t>(sizeof(float))) {}

  bool empty() const { return left_ <= 0; }
  // The next piece; where none is left, `near`, for which nothing has to come.
  const char* next(int64_t bytes, const float* near) {
    if (empty()) return reinterpret_cast<const char*>(near);
    const char* const piece = at_;
    at_ += bytes;
    left_ -= bytes;
    return piece;
  }

 private:
  const char* at_ = nullptr;
  int64_t left_ = 0;
};

// A block of depth, for the rows of one micro-kernel call and one pass of panels.
struct DepthBlock {
  const float *source, *weights, *half_weights;
  int64_t source_pitch, panel_pitch, depth;
  float* waiting;  // sums of the blocks before this one, and then also its own
  bool first, last;
  Soon soon;
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
  from.first ? clear(sums) : resume(sums, from.waiting);
  const float* bias = p.bias + channel;
  const float* shortcut = p.shortcut == nullptr ? nullptr : p.shortcut + row * p.shortcut_pitch + channel;
  float* out = p.out + row * p.out_pitch + p.border.before(row) + channel;
  accumulate(
      sums, from.source, from.source_pitch, from.weights, from.half_weights, from.panel_pitch, from.depth,
      [&](int64_t k) R2N_LAMBDA_INLINE {
        __builtin_prefetch(from.soon.source + k * kSoonBytes, 0, 2);
        __builtin_prefetch(from.soon.weights + k * kSoonBytes, 0, 2);
        __builtin_prefetch(from.soon.outputs + k * kSoonBytes, 0, 2);
      });
  if (!from.last) return suspend(sums, from.waiting);
  const int64_t present = p.full_vectors ? kWidth : p.columns - channel;
  int64_t line = p.border.width == 0 ? 0 : row / p.border.width, column = row - line * p.border.width;
#pragma GCC unroll 16
  for (int i = 0; i < P; i++) {
    const auto vector = [&](auto sum, int64_t at) R2N_LAMBDA_INLINE {
      if (at < present) finish(p, sum, bias + at, shortcut == nullptr ? nullptr : shortcut + at, out + at, present - at);
    };
#pragma GCC unroll 8
    for (int f = 0; f < sums.kFull; f++) vector(sums.full[i][f], f * kLanes<Full>);
    if constexpr (sums.kHalf) vector(sums.half(i), Panels * kPanel);
    if (shortcut != nullptr) shortcut += p.shortcut_pitch;
    out += p.out_pitch;
    if (++column == p.border.width) {
      column = 0;
      out += p.border.row_gap;
      if (++line % p.border.height == 0) out += p.border.image_gap;
    }
  }
}

// The weights of the block of depth behind a call's, or of the next pass: a piece of each of its panels.
class SoonWeights {
 public:
  SoonWeights(const float* from, int64_t panel_pitch, int64_t depth, int64_t panels)
      : from_(from), panel_pitch_(panel_pitch), depth_(depth), panels_(panels), piece_(from, depth * kPanel) {}

  const char* next(int64_t bytes, const float* near) {
    if (piece_.empty() && ++panel_ < panels_) piece_ = Region(from_ + panel_ * panel_pitch_, depth_ * kPanel);
    return piece_.next(bytes, near);
  }

 private:
  const float* from_;
  int64_t panel_pitch_, depth_, panels_, panel_ = 0;
  Region piece_;
};

}  // namespace

void pointwise_rows(const Pointwise& p, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
  alignas(64) float waiting[kPointwiseBlock * kWidest];
  const PointwiseSource& first_source = p.sources[0];
  const Passes blocks = Passes::of(last - first, pointwise_block(p));
  for (int64_t b = 0, block = first; b < blocks.count; block += blocks.rows(b), b++) {
    const int64_t rows = blocks.rows(b), next = block + rows, next_rows = smaller(rows, p.rows - next);
    Region sources(first_source.data + next * first_source.pitch, next_rows * first_source.pitch);
    Region outs(p.out + next * p.out_pitch + p.border.before(next), next_rows * p.out_pitch), shortcuts;
    if (p.shortcut != nullptr) shortcuts = Region(p.shortcut + next * p.shortcut_pitch, next_rows * p.shortcut_pitch);
    for_each_pass(p.columns, first_panel, last_panel, [&](PanelPass pass) {
      with_pass_shape(pass, [&]<int Panels, bool HalfPanel>() R2N_LAMBDA_INLINE {
        constexpr int kMost = max_rows(vectors_of(Panels, HalfPanel));
        const Passes row_passes = Passes::of(rows, kMost);
        for (int s = 0; s < 2 && p.sources[s].depth > 0; s++) {
          const PointwiseSource& source = p.sources[s];
          const bool last_source = s == 1 || p.sources[1].depth == 0;
          const int64_t panel_pitch = source.depth * kPanel;
          const float* weights = source.weights + pass.first * panel_pitch;
          const Passes depths = Passes::of(source.depth, kPointwiseDepth);
          for (int64_t d = 0, k = 0; d < depths.count; k += depths.rows(d), d++) {
            const bool last_depth = d + 1 == depths.count;
            DepthBlock from{};
            from.weights = weights + k * kPanel;
            from.half_weights = weights + Panels * panel_pitch + k * kUnit;
            from.source_pitch = source.pitch;
            from.panel_pitch = panel_pitch;
            from.depth = depths.rows(d);
            from.first = s == 0 && d == 0;
            from.last = last_source && last_depth;
            SoonWeights soon_weights(
                last_depth ? weights + Panels * panel_pitch : from.weights + from.depth * kPanel, panel_pitch,
                depths.rows(last_depth ? 0 : d + 1), Panels);
            const int64_t bytes = from.depth * kSoonBytes;
            for (int64_t i = 0, row = 0; i < row_passes.count; row += row_passes.rows(i), i++) {
              from.source = source.data + (block + row) * source.pitch + k;
              from.waiting = waiting + row * kWidest;
              from.soon.source = sources.next(bytes, from.source);
              from.soon.weights = soon_weights.next(bytes, from.source);
              from.soon.outputs = (shortcuts.empty() ? outs : shortcuts).next(bytes, from.source);
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
