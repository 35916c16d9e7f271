#include "operators/plain_operators.h"

namespace res2net_fused {
namespace {

using Ints = std::vector<int64_t>;

// A tensor of one value: the dispatcher's C interface takes no scalars.
Tensor one_value(const Tensor& like, double value, std::initializer_list<int64_t> sizes) {
  return torch::stable::full({sizes.begin(), sizes.size()}, value, like.scalar_type(), std::nullopt, like.device());
}

Tensor clamp(const Tensor& z, double high) {
  return call_operator<Tensor>(
      "aten::clamp", "Tensor", z, std::optional(one_value(z, 0, {})), std::optional(one_value(z, high, {})));
}

Tensors split(const Tensor& x, int64_t count, int64_t width) {
  Tensors groups;
  Tensor whole = x;
  for (int64_t i = 0; i < count; i++) groups.push_back(torch::stable::narrow(whole, 1, i * width, width));
  return groups;
}

Tensor concatenated(const Tensors& groups) { return call_operator<Tensor>("aten::cat", "", groups, int64_t{1}); }

Tensor plain_chain(const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const ChainNames& names) {
  const ChainProblem problem = problem_named(x, weights, names);
  Tensors outputs = split(x, problem.scale(), problem.channels);
  if (const int64_t passed = problem.passed_group(); passed >= 0 && problem.pool != Pool::none) {
    const Ints size{3, 3}, stride{problem.stride, problem.stride}, padding{1, 1};
    Tensor& group = outputs[static_cast<size_t>(passed)];
    group = problem.pool == Pool::max3
                ? call_operator<Tensor>("aten::max_pool2d", "", group, size, stride, padding, Ints{1, 1}, false)
                : call_operator<Tensor>(
                      "aten::avg_pool2d", "", group, size, stride, padding, false, *names.pool == "avg3",
                      std::optional<int64_t>());
  }
  for (int64_t k = 0; k < problem.steps; k++) {
    const size_t step = static_cast<size_t>(k), i = static_cast<size_t>(k + problem.first_convolved());
    const Tensor u = problem.adds(static_cast<int64_t>(i)) ? plain_sum(outputs[i], outputs[i - 1]) : outputs[i];
    std::optional<Tensor> bias;
    if (biases.has_value()) bias = biases->at(step);
    const int64_t dilation = problem.dilation;
    const Tensor z = plain_convolution(u, weights[step], bias, problem.stride, dilation, dilation, problem.groups);
    outputs[i] = plain_activation(z, names.activation);
  }
  return concatenated(outputs);
}

Tensor with_format(const Tensor& out, bool channels_last) {
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return unambiguous(torch::stable::contiguous(out, format), channels_last);
}

// In the wider of the types, then rounded to r's.
Tensor affine(const Tensor& r, const Tensor& scale, const Tensor& shift) {
  const Tensor product = call_operator<Tensor>("aten::mul", "Tensor", r, torch::stable::unsqueeze(scale, 1));
  return in_type_of(r, plain_sum(product, torch::stable::unsqueeze(shift, 1)));
}

}  // namespace

Tensor plain_convolution(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t padding, int64_t dilation,
    int64_t groups) {
  std::optional<Tensor> cast;
  if (bias.has_value()) cast = in_type_of(x, *bias);
  const size_t size = static_cast<size_t>(weight.dim() - 2);
  const Ints strides(size, stride), paddings(size, padding), dilations(size, dilation), none(size, 0);
  return call_operator<Tensor>("aten::convolution", "", x, weight, cast, strides, paddings, dilations, false, none, groups);
}

Tensor plain_relu(const Tensor& x) { return call_operator<Tensor>("aten::relu", "", x); }

Tensor plain_activation(const Tensor& z, const std::string& activation) {
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

Tensor plain_sum(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

Tensor plain_pointwise(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride) {
  return plain_convolution(x, weight, bias, stride, 0, 1, 1);
}

Tensor plain_hierarchical_conv2d(
    const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const ChainNames& names) {
  return with_format(plain_chain(x, weights, biases, names), suggests_channels_last(x));
}

Tensor plain_end(Tensor out, const BlockTensors& block, bool relu) {
  if (block.shortcut.has_value()) {
    const Tensor& shortcut = *block.shortcut;
    out = plain_sum(
        out, block.projects()
                 ? plain_pointwise(shortcut, *block.projection_weight, *block.projection_bias, block.projection_stride)
                 : shortcut);
  }
  return relu ? plain_relu(out) : out;
}

Tensor plain_bottle2neck(const BlockTensors& block, bool relu, const ChainNames& names) {
  const Tensor u = plain_relu(plain_pointwise(block.x, block.conv1_weight, block.conv1_bias, 1));
  const Tensor y = plain_chain(u, block.weights, block.biases, names);
  const Tensor out = plain_end(plain_pointwise(y, block.conv3_weight, block.conv3_bias, 1), block, relu);
  return with_format(out, suggests_channels_last(block.x));
}

RowsGeometry geometry_of(const RowsChain& chain) {
  const Tensors& weights = chain.weights;
  STD_TORCH_CHECK(
      chain.x.dim() == 3 && !weights.empty() && weights[0].dim() == 3 && weights[0].size(0) == weights[0].size(1) &&
          weights[0].size(0) >= 1 && weights[0].size(2) % 2 == 1 && chain.dilation >= 1,
      "x must be (N, s*w, L) and weights tensors (w, w, k), at least one, with an odd k");
  constexpr const char* kPassthroughs[] = {"last", "none", "first", "first_added"};
  constexpr const char* kPaddingModes[] = {"zeros", "reflect"};
  const auto passthrough = static_cast<Passthrough>(code_of("passthrough", chain.passthrough, kPassthroughs));
  RowsGeometry g{};
  g.batch = chain.x.size(0), g.length = chain.x.size(2);
  g.width = weights[0].size(0), g.steps = static_cast<int64_t>(weights.size()), g.taps = weights[0].size(2);
  g.dilation = std::min(chain.dilation, g.length);  // beyond the row zeros are read however far it is
  g.padding = g.dilation * (g.taps / 2);
  g.reflects = code_of("padding_mode", chain.padding_mode, kPaddingModes) == 1;
  const auto [activation, slope] = activation_named(chain.activation);
  g.keeps_input = !activation_of(activation, slope).shows_slope();
  g.first = passthrough == Passthrough::first || passthrough == Passthrough::first_added;
  g.passed = passthrough == Passthrough::none ? -1 : g.first ? 0 : g.steps;
  g.added = passthrough == Passthrough::first_added ? 0 : -1;
  STD_TORCH_CHECK(
      g.length >= 1 && chain.x.size(1) == (g.steps + (g.passed >= 0)) * g.width && (!g.reflects || g.padding < g.length),
      "x has ", chain.x.size(1), " channels and ", g.length, " values in a row, which do not fit ", g.steps,
      " convolutions of ", g.width, " channels and a padding of ", g.padding);
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(
        weight.dim() == 3 && weight.size(0) == g.width && weight.size(1) == g.width && weight.size(2) == g.taps &&
            weight.scalar_type() == chain.x.scalar_type(),
        "every weight must be (", g.width, ", ", g.width, ", ", g.taps, ") in x's type");
  }
  const auto fits = [&](const OptionalTensors& vectors) {
    if (!vectors.has_value()) return true;
    return std::all_of(vectors->begin(), vectors->end(), [&](const Tensor& v) { return v.numel() == g.width; }) &&
           static_cast<int64_t>(vectors->size()) == g.steps;
  };
  STD_TORCH_CHECK(
      fits(chain.biases) && fits(chain.scale) && fits(chain.shift) && chain.scale.has_value() == chain.shift.has_value(),
      "biases, affine_scale and affine_shift must hold ", g.steps, " tensors of ", g.width, " values, the last two together");
  return g;
}

Tensors plain_hierarchical_conv1d(const RowsChain& chain) {
  const RowsGeometry g = geometry_of(chain);
  Tensors outputs = split(chain.x, g.steps + (g.passed >= 0), g.width), kept;
  for (int64_t k = 0; k < g.steps; k++) {
    const size_t step = static_cast<size_t>(k), i = static_cast<size_t>(k + g.first);
    Tensor u = k > 0 || g.added >= 0 ? plain_sum(outputs[i], outputs[i - 1]) : outputs[i];
    if (g.reflects) u = call_operator<Tensor>("aten::reflection_pad1d", "", u, Ints{g.padding, g.padding});
    std::optional<Tensor> bias;
    if (chain.biases.has_value()) bias = chain.biases->at(step);
    const Tensor z = plain_convolution(u, chain.weights[step], bias, 1, g.reflects ? 0 : g.padding, g.dilation, 1);
    const Tensor r = torch::stable::contiguous(plain_activation(z, chain.activation));
    if (chain.keep) kept.push_back(g.keeps_input ? torch::stable::contiguous(z) : r);
    outputs[i] = chain.scale.has_value() ? affine(r, chain.scale->at(step), chain.shift->at(step)) : r;
  }
  Tensors results{torch::stable::contiguous(concatenated(outputs))};
  results.insert(results.end(), kept.begin(), kept.end());
  return results;
}

bool suggests_channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const auto dense = [&](std::array<size_t, 4> inner_first) {
    int64_t expected = 1;
    for (const size_t d : inner_first) {
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  };
  constexpr std::array<size_t, 4> kLast{1, 3, 2, 0};
  const bool empty = x.numel() == 0, last = empty || dense(kLast), first = empty || dense({3, 2, 1, 0});
  if (last != first) return last;
  int64_t least = 0;
  if (strides[1] == 0) return false;
  for (const size_t d : kLast) {
    if (sizes[d] == 0 || strides[d] < least || (d == 0 && least == strides[1])) return false;
    least = strides[d] * sizes[d];
  }
  return true;
}

Tensor unambiguous(const Tensor& out, bool channels_last) {
  const int64_t channels = out.size(1), height = out.size(2), width = out.size(3), image = channels * height * width;
  if (channels != 1 && height * width != 1) return out;
  const Ints last{image, 1, width * channels, channels}, first{image, height * width, width, 1};
  return reinterpreted(out, {out.size(0), channels, height, width}, channels_last ? last : first, 0);
}

Tensor reinterpreted(const Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t offset) {
  AtenTensorHandle view = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), offset, &view));
  return Tensor(view);
}

}  // namespace res2net_fused
