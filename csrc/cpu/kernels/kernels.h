// What the kernels of every instruction set offer to the rest of the library. Plain C++: no torch header, and nothing
// inline with external linkage, since a copy compiled for AVX-512 must never serve portable code.
#pragma once

#include <cstdint>

#define R2N_INLINE_MEMBER inline __attribute__((always_inline))

namespace res2net_fused {

constexpr int64_t kUnit = 8;     // channels of a group are padded to multiples of this in scratch and packed weights
constexpr int64_t kPanel = 16;   // output channels that packed weights keep side by side
constexpr int64_t kPoints = 36;  // of F(4x4, 3x3)

static constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
static constexpr int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

// Kinds have the order of ACTIVATIONS in res2net_fused/chain/activations.py.
struct Activation {
  enum Kind : int64_t { relu, none, hardtanh20, relu6, leaky_relu, hardswish, silu, gelu, gelu_tanh, mish } kind;
  float slope = 0;  // of leaky_relu

  // Whether it is two comparisons at most; others are a pass of their own behind the convolution.
  R2N_INLINE_MEMBER bool clamps() const { return kind <= relu6; }
  // Whether the derivative can be read off the output.
  R2N_INLINE_MEMBER bool shows_slope() const { return kind < leaky_relu || (kind == leaky_relu && slope >= 0); }
};

enum class Pool : int64_t { none = 0, avg3 = 1, avg3_nopad = 2, max3 = 3 };

// Pixels with their channels side by side; strides in floats.
struct ConstView {
  const float* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0;

  R2N_INLINE_MEMBER const float* at(int64_t n, int64_t y, int64_t x) const { return data + n * image + y * row + x * pixel; }
};

struct View {
  float* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0;

  R2N_INLINE_MEMBER float* at(int64_t n, int64_t y, int64_t x) const { return data + n * image + y * row + x * pixel; }
};

// One convolution of the chain. Every view starts at channel 0 of its group in the first pixel of the first image.
struct Step {
  int64_t in_height, in_width, height, width;
  int64_t channels;  // of a group, w
  int64_t groups, stride, row_dilation, column_dilation;
  Activation activation;
  ConstView source;          // what is convolved: u between its zero borders, or a group of x
  bool source_has_border;    // so many zero pixels as the dilations say may be read around it
  bool source_full_vectors;  // channels behind the group, up to a multiple of kUnit, may be read as well
  ConstView addend;          // the next group of x, and
  View next;                 // where its sum with y goes; data is null where the next step adds nothing
  bool addend_full_vectors;
  // Backward only: the output of the activation before, whose backward that sum goes through. It has the addend's pixels.
  ConstView mask;
  Activation mask_activation;
  View out;
  bool out_full_vectors;  // channels behind the slot are written later: stores may spill into them
  // Winograd's last convolution also copies the group that passes the chain by, while its pixels are in cache; else null.
  ConstView passed;
  View passed_out;
  // [point][panel][w][16] from the first panel that is asked for on, the group's last panel [w][8] where at most 8 channels are
  // left; `winograd_point` floats from point to point.
  const float* winograd;
  int64_t winograd_point;
  const float* direct;  // [group][panel][tap][w/groups][16], the last panel 8 wide likewise; null: nothing is computed again
  const float* bias;    // (w padded,)
};

// The weights of one convolution as the caller has them: strides in floats, negative where the taps are turned around.
struct WeightView {
  const float* data = nullptr;
  int64_t output = 0, input = 0, row = 0, column = 0;

  // Those of the convolution that is the input gradient: both kinds of channels swapped, the taps backwards.
  WeightView turned() const { return {data + 2 * (row + column), input, output, -row, -column}; }
};

// One source of a 1x1 convolution: rows (pixels) of channels side by side, `pitch` floats apart, and the weights they meet.
struct PointwiseSource {
  const float* data = nullptr;
  int64_t pitch = 0;
  int64_t depth = 0;               // input channels; 0: there is no such source
  const float* weights = nullptr;  // [panel][depth][16], the last panel [depth][8] where at most 8 output channels are left
};

// What lies between the rows of pixels that are written: nothing where width is 0, else the border of images.
struct OutBorder {
  int64_t width, height;       // of an image, in pixels
  int64_t row_gap, image_gap;  // floats between two rows, and those that are added to them between two images

  // Floats of borders between the first pixel and this one, counted over all images.
  R2N_INLINE_MEMBER int64_t before(int64_t pixel) const {
    return width == 0 ? 0 : pixel / width * row_gap + pixel / (width * height) * image_gap;
  }
};

// A 1x1 convolution, or the sum of two, over rows of pixels: out = relu(sources * weights + bias + shortcut).
struct Pointwise {
  PointwiseSource sources[2];
  int64_t rows;           // pixels; those behind the ones that a call works on are asked for ahead
  const float* bias;      // bias_floats(columns)
  const float* shortcut;  // or null
  int64_t shortcut_pitch;
  float* out;
  int64_t out_pitch;
  OutBorder border;   // around the images of `out`
  int64_t columns;    // output channels
  bool full_vectors;  // behind a pixel of `out` there is room up to a multiple of kPanel; without a shortcut only
  bool relu;
};

constexpr int64_t kPointwiseDepth = 512;  // of source and weights: with the rows of one micro-kernel call, half of L1

// Rows of pixels, at most, that share one reading of the weights: their block of source stays in L2.
constexpr int64_t kPointwiseBlock = 200;
// Fewer where all weights stay there too, so that rows which follow each other are written soon.
constexpr int64_t pointwise_block(const Pointwise& p) {
  return p.sources[0].depth + p.sources[1].depth <= kPointwiseDepth ? 36 : kPointwiseBlock;
}

// A convolution of a stem, for one row of its output, whose pixels have no gap between them, nor have those of its source.
struct RowConvolution {
  int64_t taps;  // rows of the kernel
  int64_t run;   // floats under one of them: its columns times the input channels
  int64_t step;  // floats from where one pixel's run begins to the next one's: stride times the input channels
  const float* weights;  // [panel][taps * run][16], the last panel [taps * run][8] where at most 8 output channels are left
  const float* bias;     // bias_floats(columns)
  int64_t columns;       // output channels
};

// One row of the largest of 3x3 pixels, at every `stride`th one; pixels beyond the image are not there.
struct MaxRow {
  int64_t in_pixels, pixel, channels, stride, out_pixel;  // pixel, out_pixel: floats from one to the next
};

// One BatchNorm in training mode with the activation behind it. z, next, dz and du hold pixels of `channels` floats without a
// gap; pitches are floats from one pixel to the next.
struct NormForward {
  int64_t channels;
  Activation activation;
  const float *z, *mean, *scale, *shift;  // y = activation((z - mean) * scale + shift)
  float* out;
  int64_t out_pitch;
  float* next;          // y + addend: what is convolved next; or null
  const float* addend;  // the next group of x
  int64_t addend_pitch;
};

struct NormBackward {
  int64_t channels;
  Activation activation;
  const float *grad, *out;
  const float *z, *mean;  // none without statistics
  int64_t grad_pitch, out_pitch;
  const float* du;  // of the convolution that read y as well, or null
  float* du_out;    // where that one is to be copied, or null
  int64_t du_out_pitch;
  float* dz;
  int64_t dz_pitch;                     // with statistics: no gap
  const float *scale, *offset, *slope;  // of the second pass
};

// Tiles along a dimension of `length` outputs: `big_count` of `big` and `small_count` of `small`; big > small. A tile size is 2,
// 3 or 4 and stands for F(size, 3). The small ones lie in the middle, so that halves take equally long. Where all are big, the
// last one may reach back over the one before it.
struct Split {
  int64_t length = 0, big = 0, big_count = 0, small = 0, small_count = 0;

  R2N_INLINE_MEMBER int64_t count() const { return big_count + small_count; }
  R2N_INLINE_MEMBER int64_t before_small() const { return (big_count + 1) / 2; }
  R2N_INLINE_MEMBER bool is_big(int64_t i) const { return i < before_small() || i >= before_small() + small_count; }
  R2N_INLINE_MEMBER int64_t start(int64_t i) const {
    if (small_count == 0) return i * big < length - big ? i * big : length - big;
    if (!is_big(i)) return before_small() * big + (i - before_small()) * small;
    return i < before_small() ? i * big : length - (count() - i) * big;
  }
};

struct TileGrid {
  Split rows, columns;

  R2N_INLINE_MEMBER int64_t per_image() const { return rows.count() * columns.count(); }
};

constexpr int64_t kMaxBlockTiles = 64;

// Consecutive tiles of the batch that are transformed and multiplied together; at most kMaxBlockTiles.
struct Block {
  int64_t first, count;
};

// Floats between two points of V and M: 64 bytes more than they hold, against addresses that share a cache set.
static constexpr int64_t point_pitch(int64_t tiles, int64_t channels) { return tiles * channels + 16; }

// Where a block's V or Z has its channels: side by side, tile after tile, as products with the weights read them; or panel
// after panel, of each first all tiles, as the products of V and Z read them.
struct PointLayout {
  int64_t point, tile, panel;  // floats from one to the next; a panel's channels are side by side

  static constexpr PointLayout tiles_first(int64_t tiles, int64_t channels) {
    return {point_pitch(tiles, round_up(channels, kUnit)), round_up(channels, kUnit), kPanel};
  }
  static constexpr PointLayout panels_first(int64_t tiles, int64_t channels) {
    return {point_pitch(tiles, round_up(channels, kPanel)), kPanel, tiles * kPanel};
  }
  R2N_INLINE_MEMBER int64_t at(int64_t channel) const { return channel / kPanel * panel + channel % kPanel; }
  // Floats of all points: whole cache lines, 36 times a multiple of 8.
  R2N_INLINE_MEMBER int64_t floats() const { return kPoints * point; }
};

// Output channels whose weights' gradients are formed together, and what that takes: all points of one panel of inputs.
constexpr int64_t kWeightRows = kPanel;
constexpr int64_t kWeightSums = kPoints * kWeightRows * kPanel;

struct Kernels {
  const char* name;
  // Panels that one micro-kernel pass takes at most (with a half panel behind them).
  int64_t panels_per_pass;

  // V of a block in some layout, for channels first ... last (multiples of kUnit).
  void (*winograd_input)(const Step&, const TileGrid&, Block, float* v, const PointLayout&, int64_t first, int64_t last);
  // Multiplies by the panels, transforms back, and writes out and next. m: point_pitch(tiles, 16 * panels_per_pass + 8) for
  // each point. patch: 36 * w floats, for tiles that are not finite and therefore computed directly. False where one was
  // not, since step.direct is null.
  bool (*winograd_output)(
      const Step&, const TileGrid&, Block, const float* v, float* m, float* patch, int64_t first_panel, int64_t last_panel);
  // Z of the gradients dz of a block's outputs, as V; panels first.
  void (*winograd_gradient)(ConstView dz, int64_t channels, const TileGrid&, Block, float* z, int64_t first, int64_t last);
  // The weights' gradient (o, 9 taps, w padded) and the bias's (o,) of output channels first ... last, at `total` and `bias`,
  // from the block's V of u and Z, panels first; with `add` onto what is there. first: a panel's. sums: kWeightSums floats.
  void (*winograd_weight_gradient)(
      int64_t channels, const TileGrid&, Block, const float* v, const float* z, float* sums, float* total, float* bias,
      int64_t first, int64_t last, bool add);
  // Output rows first ... last, counted over all images, by direct convolution; panels counted over all groups.
  void (*direct_rows)(const Step&, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel);
  // target = source (+ plus, where plus.data is not null), rows first ... last.
  void (*copy_rows)(
      ConstView source, ConstView plus, View target, int64_t height, int64_t width, int64_t channels, int64_t first,
      int64_t last);
  // The pass-through: copied, or averaged over 3x3 windows. Output rows first ... last.
  void (*pass_rows)(
      ConstView source, int64_t in_height, int64_t in_width, View target, int64_t height, int64_t width, int64_t channels,
      int64_t stride, Pool, int64_t first, int64_t last);
  // Rows (pixels) first ... last of the output channels of some panels.
  void (*pointwise_rows)(const Pointwise&, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel);
  // weights (w, w/groups, 3, 3) of one convolution into the layouts of Step; panels counted over all groups. Winograd's
  // begin with the first panel, `point` floats from point to point.
  void (*pack_winograd)(
      const WeightView&, int64_t channels, float* packed, int64_t point, int64_t first_panel, int64_t last_panel);
  void (*pack_direct)(
      const float* weights, int64_t channels, int64_t groups, float* packed, int64_t first_panel, int64_t last_panel);
  // BatchNorm in training mode, pixels first ... last: mean and squared deviations of z (channels,); the activated output;
  // the sums of dy and of dy * (z - mean) with dy in dz's place; then dz.
  void (*norm_moments)(const float* z, int64_t channels, int64_t first, int64_t last, float* mean, float* squares);
  void (*norm_forward)(const NormForward&, int64_t first, int64_t last);
  void (*activation_backward)(const NormBackward&, int64_t first, int64_t last);  // dz without statistics
  void (*norm_backward_sums)(const NormBackward&, int64_t first, int64_t last, float* sums, float* products);
  void (*norm_backward_apply)(const NormBackward&, int64_t first, int64_t last);
  // weights (columns, depth) into the layout of Pointwise.
  void (*pack_pointwise)(
      const float* weights, int64_t columns, int64_t depth, float* packed, int64_t first_panel, int64_t last_panel);
  // relu(convolution + bias) of `pixels`. rows: of the source, one for each of the kernel's, where the first pixel's run begins.
  void (*convolve_row)(const RowConvolution&, const float* const* rows, float* out, int64_t pixels);
  // From three rows of the source; one beyond the image is the middle one again, which changes no maximum.
  void (*max_row)(const MaxRow&, const float* const* rows, float* out);
};

static constexpr int64_t panel_count(int64_t channels) { return (round_up(channels, kUnit) + kPanel - 1) / kPanel; }

// Floats of the packed weights: one point of one convolution, one convolution, and one group of it.
static constexpr int64_t winograd_point(int64_t channels) { return channels * round_up(channels, kUnit); }
static constexpr int64_t winograd_floats(int64_t channels) { return kPoints * winograd_point(channels); }
static constexpr int64_t direct_group_floats(int64_t group_channels) {
  return 9 * group_channels * round_up(group_channels, kUnit);
}

static constexpr int64_t pointwise_floats(int64_t columns, int64_t depth) { return depth * round_up(columns, kUnit); }

// Floats of one convolution's packed bias, padded by a panel, since kernels load whole vectors from any channel on.
static constexpr int64_t bias_floats(int64_t channels) { return round_up(channels, kUnit) + kPanel; }

// The kernels of one instruction set; null where this library was not compiled for it.
namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

}  // namespace res2net_fused
