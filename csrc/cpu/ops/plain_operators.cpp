#include "cpu/ops/plain_operators.h"

#include "cpu/chain/problem.h"
#include "cpu/ops/settings_by_name.h"

namespace res2net_fused {
namespace {

using Ints = std::vector<int64_t>;

Tensor convolution(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t padding, int64_t dilation,
    int64_t groups) {
  std::optional<Tensor> cast;
  if (bias.has_value()) cast = torch::stable::to(*bias, x.scalar_type());
  const Ints strides{stride, stride}, paddings{padding, padding}, dilations{dilation, dilation}, none{0, 0};
  return call_operator<Tensor>("aten::convolution", "", x, weight, cast, strides, paddings, dilations, false, none, groups);
}

// A tensor of one value: the dispatcher's C interface takes no scalars.
Tensor one_value(const Tensor& like, double value, std::initializer_list<int64_t> sizes) {
  return torch::stable::full({sizes.begin(), sizes.size()}, value, like.scalar_type());
}

Tensor clamp(const Tensor& z, double high) {
  return call_operator<Tensor>(
      "aten::clamp", "Tensor", z, std::optional(one_value(z, 0, {})), std::optional(one_value(z, high, {})));
}

Tensor activate(const Tensor& z, const std::string& activation) {
  const auto [code, slope] = activation_named(activation);
  switch (static_cast<Activation::Kind>(code)) {
    case Activation::relu:
      return plain_relu(z);
    case Activation::none:
      return z;
    case Activation::hardtanh20:
      return clamp(z, 20);
    case Activation::relu6:
      return clamp(z, 6);
    case Activation::leaky_relu:
      return call_operator<Tensor>("aten::prelu", "", z, one_value(z, slope, {1}));
    case Activation::hardswish:
      return call_operator<Tensor>("aten::hardswish", "", z);
    case Activation::silu:
      return call_operator<Tensor>("aten::silu", "", z);
    case Activation::gelu:
      return call_operator<Tensor>("aten::gelu", "", z, std::string("none"));
    case Activation::gelu_tanh:
      return call_operator<Tensor>("aten::gelu", "", z, std::string("tanh"));
    case Activation::mish:
      return call_operator<Tensor>("aten::mish", "", z);
  }
  return z;
}

}  // namespace

Tensor plain_relu(const Tensor& x) { return call_operator<Tensor>("aten::relu", "", x); }

Tensor plain_sum(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

Tensor plain_pointwise(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride) {
  return convolution(x, weight, bias, stride, 0, 1, 1);
}

Tensor plain_chain(
    const Tensor& x, const std::vector<Tensor>& weights, const std::optional<std::vector<Tensor>>& biases,
    const ChainNames& names) {
  const ChainProblem problem = problem_named(x, weights, names);
  std::vector<Tensor> outputs;
  for (int64_t i = 0; i < problem.scale(); i++) {
    Tensor part = x;
    outputs.push_back(torch::stable::narrow(part, 1, i * problem.channels, problem.channels));
  }
  if (const int64_t passed = problem.passed_group(); passed >= 0 && problem.pool != Pool::none) {
    const Ints size{3, 3}, stride{problem.stride, problem.stride}, padding{1, 1};
    Tensor& group = outputs[static_cast<size_t>(passed)];
    group = call_operator<Tensor>(
        "aten::avg_pool2d", "", group, size, stride, padding, false, *names.pool == "avg3", std::optional<int64_t>());
  }
  for (int64_t k = 0; k < problem.steps; k++) {
    const size_t step = static_cast<size_t>(k), i = static_cast<size_t>(k + problem.first_convolved());
    const Tensor u = problem.adds(static_cast<int64_t>(i)) ? plain_sum(outputs[i], outputs[i - 1]) : outputs[i];
    std::optional<Tensor> bias;
    if (biases.has_value()) bias = biases->at(step);
    const int64_t dilation = problem.dilation;
    const Tensor z = convolution(u, weights[step], bias, problem.stride, dilation, dilation, problem.groups);
    outputs[i] = activate(z, names.activation);
  }
  return call_operator<Tensor>("aten::cat", "", outputs, int64_t{1});
}

}  // namespace res2net_fused
