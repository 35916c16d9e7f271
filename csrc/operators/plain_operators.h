// The operators by PyTorch's own, where no kernel of this package can run and there is no Python: the twin of
// res2net_fused/chain/reference.py. On any device.
#pragma once

#include "operators/chain_names.h"

namespace res2net_fused {

// A block's tensors, as the operator takes them.
struct BlockTensors {
  const Tensor& x;
  const std::optional<Tensor>& shortcut;
  const Tensor &conv1_weight, &conv1_bias;
  const Tensors &weights, &biases;
  const Tensor &conv3_weight, &conv3_bias;
  const std::optional<Tensor>&projection_weight, &projection_bias;
  int64_t projection_stride;

  bool projects() const { return projection_weight.has_value() && projection_bias.has_value(); }
};

// relu(out + shortcut), of what the block has.
RES2NET_SHARED Tensor plain_end(Tensor out, const BlockTensors& block, bool relu);

// A chain along rows, as the operator takes it.
struct RowsChain {
  const Tensor& x;  // (N, s*w, L)
  const Tensors& weights;
  const OptionalTensors &biases, &scale, &shift;
  int64_t dilation;
  const std::string &passthrough, &padding_mode, &activation;
  bool keep;
};

// What `RowsChain` comes to, once it is checked.
struct RowsGeometry {
  int64_t batch, length, width, steps, taps, dilation, padding;
  int64_t first, passed, added;  // groups: the first convolved one, the one without a convolution, and that, if added, or -1
  bool reflects;
  bool keeps_input;  // for the backward: that of the activations, whose outputs do not show the derivatives
};

RES2NET_SHARED RowsGeometry geometry_of(const RowsChain& chain);

RES2NET_SHARED Tensor
plain_hierarchical_conv2d(const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const ChainNames& names);

RES2NET_SHARED Tensor plain_bottle2neck(const BlockTensors& block, bool relu, const ChainNames& names);

RES2NET_SHARED Tensors plain_hierarchical_conv1d(const RowsChain& chain);

// Of images or, with a weight (w, w, k), of rows.
RES2NET_SHARED Tensor plain_convolution(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t padding, int64_t dilation,
    int64_t groups);

// A convolution of images without padding.
RES2NET_SHARED Tensor plain_pointwise(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride);

RES2NET_SHARED Tensor plain_sum(const Tensor& a, const Tensor& b);

RES2NET_SHARED Tensor plain_relu(const Tensor& x);

// By the name of the activation.
RES2NET_SHARED Tensor plain_activation(const Tensor& z, const std::string& activation);

inline Tensor in_type_of(const Tensor& x, const Tensor& value) {
  return value.scalar_type() == x.scalar_type() ? value : torch::stable::to(value, x.scalar_type());
}

// Whether x (N, C, H, W) suggests channels-last, as memory_format in res2net_fused/chain/memory_format.py decides it.
RES2NET_SHARED bool suggests_channels_last(const Tensor& x);

// `out`, dense in the asked format; of one pixel or channel it is in both, and its strides say which.
RES2NET_SHARED Tensor unambiguous(const Tensor& out, bool channels_last);

// The same memory with other sizes and strides, from `offset` elements behind the first on.
RES2NET_SHARED Tensor
reinterpreted(const Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t offset);

}  // namespace res2net_fused
