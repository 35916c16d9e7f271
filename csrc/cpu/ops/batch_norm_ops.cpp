// torch.ops.res2net_fused_native.cpu_norm_*: BatchNorm in training mode with the activation and the sum behind it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/ops/op_arguments.h"

namespace res2net_fused {
namespace {

// Pixels whose moments are taken together: their channels stay in cache, and the order of every sum is the same for any
// number of threads.
constexpr int64_t kBlockPixels = 128;
constexpr int64_t kGrainPixels = 512;

int64_t blocks_of(int64_t pixels) { return (pixels + kBlockPixels - 1) / kBlockPixels; }

// A channels-last tensor of fp32 whose pixels lie at one distance: their number and that distance.
int64_t pitch_of(const Tensor& t, const char* name, int64_t pixels, int64_t channels) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 4 && t.size(1) == channels &&
          t.size(0) * t.size(2) * t.size(3) == pixels,
      name, " must be fp32 with ", channels, " channels and ", pixels, " pixels");
  // The distance is read off the first dimension that is stepped along.
  int64_t pitch = channels;
  if (t.size(3) > 1) {
    pitch = t.stride(3);
  } else if (t.size(2) > 1) {
    pitch = t.stride(2);
  } else if (t.size(0) > 1) {
    pitch = t.stride(0);
  }
  const bool regular = (t.size(1) == 1 || t.stride(1) == 1) && (t.size(3) == 1 || t.stride(3) == pitch) &&
                       (t.size(2) == 1 || t.stride(2) == pitch * t.size(3)) &&
                       (t.size(0) == 1 || t.stride(0) == pitch * t.size(2) * t.size(3));
  STD_TORCH_CHECK(regular, name, " must be channels-last, its pixels at one distance");
  return pitch;
}

void check_dense(const Tensor& t, const char* name, int64_t pixels, int64_t channels) {
  STD_TORCH_CHECK(pitch_of(t, name, pixels, channels) == channels, name, " must be channels-last without gaps");
}

const float* channel_floats(const Tensor& t, const char* name, int64_t channels) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == channels, name, " must be ",
      channels, " contiguous floats on the CPU");
  return static_cast<const float*>(t.const_data_ptr());
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* writable(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// z (N, w, H, W) -> (3, w): mean, 1 / sqrt(biased variance + eps), unbiased variance.
Tensor norm_statistics(const Tensor& z, double eps, int64_t instruction_set) {
  const int64_t w = z.size(1), pixels = z.size(0) * z.size(2) * z.size(3);
  check_dense(z, "z", pixels, w);
  const Kernels& kernels = kernels_of(instruction_set);
  const int64_t blocks = blocks_of(pixels);
  const Tensor partial = new_floats(2 * blocks, w);
  float* const means = writable(partial);
  float* const squares = means + blocks * w;
  torch::stable::parallel_for(0, blocks, kGrainPixels / kBlockPixels, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
      const int64_t end = std::min(pixels, (b + 1) * kBlockPixels);
      kernels.norm_moments(floats(z), w, b * kBlockPixels, end, means + b * w, squares + b * w);
    }
  });
  const Tensor result = new_floats(3, w);
  float* const to = writable(result);
  for (int64_t c = 0; c < w; c++) {
    double mean = 0, total = 0;
    for (int64_t b = 0; b < blocks; b++) {
      const auto count = static_cast<double>(std::min(kBlockPixels, pixels - b * kBlockPixels));
      mean += count * means[b * w + c];
    }
    mean /= static_cast<double>(pixels);
    for (int64_t b = 0; b < blocks; b++) {
      const auto count = static_cast<double>(std::min(kBlockPixels, pixels - b * kBlockPixels));
      const double off = means[b * w + c] - mean;
      total += squares[b * w + c] + count * off * off;
    }
    if (!std::isfinite(total)) {  // squares of fp32 overflow from 1e19 on
      mean = total = 0;
      for (int64_t p = 0; p < pixels; p++) mean += floats(z)[p * w + c];
      mean /= static_cast<double>(pixels);
      for (int64_t p = 0; p < pixels; p++) total += std::pow(floats(z)[p * w + c] - mean, 2);
    }
    const double spread = total / static_cast<double>(pixels) + eps;
    to[c] = static_cast<float>(mean);
    to[w + c] = spread == 0 ? 0 : static_cast<float>(1 / std::sqrt(spread));  // as ATen
    to[2 * w + c] = static_cast<float>(total / static_cast<double>(pixels - 1));
  }
  return result;
}

// out = activation((z - mean) * scale + shift); next = out + addend, where there is one.
void norm_forward(
    const Tensor& z, const Tensor& mean, const Tensor& scale, const Tensor& shift, int64_t activation, double slope,
    const Tensor& out, const std::optional<Tensor>& addend, const std::optional<Tensor>& next, int64_t instruction_set) {
  const int64_t w = z.size(1), pixels = z.size(0) * z.size(2) * z.size(3);
  check_dense(z, "z", pixels, w);
  NormForward n{};
  n.channels = w;
  n.activation = activation_read_off(activation, slope);
  n.z = floats(z);
  n.mean = channel_floats(mean, "mean", w);
  n.scale = channel_floats(scale, "scale", w);
  n.shift = channel_floats(shift, "shift", w);
  n.out_pitch = pitch_of(out, "out", pixels, w);
  n.out = writable(out);
  STD_TORCH_CHECK(addend.has_value() == next.has_value(), "addend and next go together");
  if (addend.has_value()) {
    n.addend_pitch = pitch_of(*addend, "addend", pixels, w);
    n.addend = floats(*addend);
    check_dense(*next, "next", pixels, w);
    n.next = writable(*next);
  }
  const Kernels& kernels = kernels_of(instruction_set);
  torch::stable::parallel_for(
      0, pixels, kGrainPixels, [&](int64_t first, int64_t last) { kernels.norm_forward(n, first, last); });
}

// What both kinds of backward read and write: grad and out of one group, du added to grad and copied to du_out, dz dense.
NormBackward backward_of(
    const Tensor& grad, const std::optional<Tensor>& du, const std::optional<Tensor>& du_out, const Tensor& out,
    int64_t activation, double slope, const Tensor& dz) {
  const int64_t w = out.size(1), pixels = out.size(0) * out.size(2) * out.size(3);
  NormBackward n{};
  n.channels = w;
  n.activation = activation_read_off(activation, slope);
  n.grad_pitch = pitch_of(grad, "grad", pixels, w);
  n.grad = floats(grad);
  n.out_pitch = pitch_of(out, "out", pixels, w);
  n.out = floats(out);
  if (du.has_value()) {
    check_dense(*du, "du", pixels, w);
    n.du = floats(*du);
    if (du_out.has_value()) {
      n.du_out_pitch = pitch_of(*du_out, "du_out", pixels, w);
      n.du_out = writable(*du_out);
    }
  }
  n.dz = writable(dz);
  n.dz_pitch = w;
  return n;
}

// dz, dense, of a convolution without BatchNorm.
Tensor activation_backward(
    const Tensor& grad, const std::optional<Tensor>& du, const std::optional<Tensor>& du_out, const Tensor& out,
    int64_t activation, double slope, int64_t instruction_set) {
  const Kernels& kernels = kernels_of(instruction_set);
  const Tensor dz = empty_nhwc(out.size(0), out.size(1), out.size(2), out.size(3));
  const NormBackward n = backward_of(grad, du, du_out, out, activation, slope, dz);
  torch::stable::parallel_for(0, out.size(0) * out.size(2) * out.size(3), kGrainPixels, [&](int64_t first, int64_t last) {
    kernels.activation_backward(n, first, last);
  });
  return dz;
}

// dz, dense, and (2, w): the gradients of gamma and beta.
std::tuple<Tensor, Tensor> norm_backward(
    const Tensor& grad, const std::optional<Tensor>& du, const std::optional<Tensor>& du_out, const Tensor& out,
    const Tensor& z, const Tensor& mean, const Tensor& invstd, const Tensor& gamma, int64_t activation, double slope,
    int64_t instruction_set) {
  const int64_t w = z.size(1), pixels = z.size(0) * z.size(2) * z.size(3);
  check_dense(z, "z", pixels, w);
  const Tensor dz = empty_nhwc(z.size(0), w, z.size(2), z.size(3));
  NormBackward n = backward_of(grad, du, du_out, out, activation, slope, dz);
  n.z = floats(z);
  n.mean = channel_floats(mean, "mean", w);
  const float* const deviation = channel_floats(invstd, "invstd", w);
  const float* const weight = channel_floats(gamma, "gamma", w);

  const Kernels& kernels = kernels_of(instruction_set);
  const int64_t blocks = blocks_of(pixels);
  const Tensor partial = new_floats(2 * blocks, w);
  float* const sums = writable(partial);
  float* const products = sums + blocks * w;
  torch::stable::parallel_for(0, blocks, kGrainPixels / kBlockPixels, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
      const int64_t end = std::min(pixels, (b + 1) * kBlockPixels);
      kernels.norm_backward_sums(n, b * kBlockPixels, end, sums + b * w, products + b * w);
    }
  });
  const Tensor gradients = new_floats(2, w), factors = new_floats(3, w);
  float *const to = writable(gradients), *const scale = writable(factors);
  float *const offset = scale + w, *const steepness = offset + w;
  const auto count = static_cast<double>(pixels);
  for (int64_t c = 0; c < w; c++) {
    double sum = 0, product = 0;
    for (int64_t b = 0; b < blocks; b++) {
      sum += sums[b * w + c];
      product += products[b * w + c];
    }
    const double inverse = deviation[c];
    to[c] = static_cast<float>(product * inverse);
    to[w + c] = static_cast<float>(sum);
    scale[c] = static_cast<float>(weight[c] * inverse);
    offset[c] = static_cast<float>(sum / count);
    steepness[c] = static_cast<float>(product * inverse * inverse / count);
  }
  n.scale = scale;
  n.offset = offset;
  n.slope = steepness;
  torch::stable::parallel_for(
      0, pixels, kGrainPixels, [&](int64_t first, int64_t last) { kernels.norm_backward_apply(n, first, last); });
  return {dz, gradients};
}

// a + b, channel slices of channels-last tensors, without gaps.
Tensor sum(const Tensor& a, const Tensor& b, int64_t instruction_set) {
  const int64_t w = a.size(1), pixels = a.size(0) * a.size(2) * a.size(3);
  const int64_t a_pitch = pitch_of(a, "a", pixels, w), b_pitch = pitch_of(b, "b", pixels, w);
  const Tensor result = empty_nhwc(a.size(0), w, a.size(2), a.size(3));
  const Kernels& kernels = kernels_of(instruction_set);
  const ConstView from{floats(a), 0, a_pitch, 0}, plus{floats(b), 0, b_pitch, 0};  // every pixel a row
  const View to{writable(result), 0, w, 0};
  torch::stable::parallel_for(0, pixels, kGrainPixels, [&](int64_t first, int64_t last) {
    kernels.copy_rows(from, plus, to, pixels, 1, w, first, last);
  });
  return result;
}

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def("cpu_sum(Tensor a, Tensor b, int instruction_set) -> Tensor");
  m.def("cpu_norm_statistics(Tensor z, float eps, int instruction_set) -> Tensor");
  m.def(
      "cpu_norm_forward(Tensor z, Tensor mean, Tensor scale, Tensor shift, int activation, float slope, "
      "Tensor(a!) out, Tensor? addend, Tensor(b!)? next, int instruction_set) -> ()");
  m.def(
      "cpu_activation_backward(Tensor grad, Tensor? du, Tensor(a!)? du_out, Tensor out, int activation, "
      "float slope, int instruction_set) -> Tensor");
  m.def(
      "cpu_norm_backward(Tensor grad, Tensor? du, Tensor(a!)? du_out, Tensor out, Tensor z, Tensor mean, Tensor invstd, "
      "Tensor gamma, int activation, float slope, int instruction_set) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CPU, m) {
  m.impl("cpu_sum", TORCH_BOX(&res2net_fused::sum));
  m.impl("cpu_norm_statistics", TORCH_BOX(&res2net_fused::norm_statistics));
  m.impl("cpu_norm_forward", TORCH_BOX(&res2net_fused::norm_forward));
  m.impl("cpu_activation_backward", TORCH_BOX(&res2net_fused::activation_backward));
  m.impl("cpu_norm_backward", TORCH_BOX(&res2net_fused::norm_backward));
}
