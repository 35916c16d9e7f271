// torch.ops.res2net_fused_native.cpu_stem_forward: the convolutions in front of a network's blocks, and their pooling.
#include <torch/csrc/stable/library.h>

#include "cpu/chain/stem.h"
#include "cpu/ops/op_arguments.h"

namespace res2net_fused {
namespace {

constexpr size_t kNumbers = 7;  // of `geometry`, for each convolution: the fields of StemConvolution

// packed: of each convolution the weights, as cpu_pack_pointwise returns them of (columns, rows * columns * channels of the
// kernel, 1, 1), and the biases.
Tensor stem_forward(
    const Tensor& x_given, const std::vector<Tensor>& packed, const std::vector<int64_t>& geometry, bool pools,
    bool channels_last, int64_t instruction_set) {
  STD_TORCH_CHECK(x_given.is_cpu() && x_given.dim() == 4, "x must be a four-dimensional tensor on the CPU");
  const size_t count = geometry.size() / kNumbers;
  STD_TORCH_CHECK(
      count >= 1 && geometry.size() == count * kNumbers && packed.size() == 2 * count,
      "geometry must hold 7 numbers and packed 2 tensors for each convolution, not ", geometry.size(), " and ", packed.size());
  const Tensor x = x_given.scalar_type() == ScalarType::Float ? x_given : torch::stable::to(x_given, ScalarType::Float);
  StemData data{};
  data.batch = x.size(0);
  int64_t channels = data.channels = x.size(1), height = data.height = x.size(2), width = data.width = x.size(3);
  data.image = x.stride(0);
  data.channel = x.stride(1);
  data.row = x.stride(2);
  data.pixel = x.stride(3);
  for (size_t i = 0; i < count; i++) {
    const int64_t* const g = geometry.data() + i * kNumbers;
    StemConvolution c{g[0], g[1], g[2], g[3], g[4], g[5], g[6], nullptr, nullptr};
    STD_TORCH_CHECK(
        channels >= 1 && c.channels >= 1 && 1 <= c.kernel_height && c.kernel_height <= kMaxTaps && c.kernel_width >= 1 &&
            c.row_stride >= 1 && c.column_stride >= 1 && c.row_padding >= 0 && c.column_padding >= 0,
        "geometry of convolution ", i, " does not fit: at most ", kMaxTaps, " rows of a kernel, sizes and strides from 1 on");
    const int64_t depth = c.kernel_height * c.kernel_width * channels;
    c.weights = packed_floats(packed[2 * i], "weights", pointwise_floats(c.channels, depth));
    c.bias = packed_floats(packed[2 * i + 1], "bias", bias_floats(c.channels));
    height = convolved_size(height, c.kernel_height, c.row_stride, c.row_padding);
    width = convolved_size(width, c.kernel_width, c.column_stride, c.column_padding);
    STD_TORCH_CHECK(height >= 1 && width >= 1, "the kernel of convolution ", i, " is larger than what it reads");
    channels = c.channels;
    data.convolutions.push_back(c);
  }
  data.pools = pools;
  if (pools) height = pooled_size(height), width = pooled_size(width);
  Tensor out = empty_nhwc(data.batch, channels, height, width);
  if (data.batch > 0) {
    data.x = static_cast<const float*>(x.const_data_ptr());
    data.out = static_cast<float*>(out.mutable_data_ptr());
    run_stem(data, kernels_of(instruction_set));
  }
  return as_asked(out, x_given.scalar_type(), channels_last);
}

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def(
      "cpu_stem_forward(Tensor x, Tensor[] packed, int[] geometry, bool pools, bool channels_last, int instruction_set) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CPU, m) { m.impl("cpu_stem_forward", TORCH_BOX(&res2net_fused::stem_forward)); }
