// The bodies of res2net_fused::hierarchical_conv2d and bottle2neck on the CPU. Checks and choice are Python's (decisions.h); what
// the kernels need to stay inside their memory is checked here as well.
#include <torch/csrc/stable/library.h>

#include "cpu/ops/native_calls.h"
#include "cpu/ops/plain_operators.h"
#include "cpu/ops/settings_by_name.h"
#include "operators/decisions.h"

namespace res2net_fused {
namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::optional<std::vector<Tensor>>;
using OptionalString = std::optional<std::string>;

constexpr const char* kOwn = "cpu";

// The settings of a decision: `CpuBackend.settings` in Python has the same order.
struct Settings {
  int64_t arithmetic, instruction_set;
  bool from_weights;  // of a chain that is not packed: Winograd's weights are packed in the call
};

Settings settings_of(const Decision& decision) {
  return {decision.settings[0], decision.settings[1], decision.settings[2] != 0};
}

Decision decide_without_python(const std::string& backend, const Tensor& x) {
  constexpr const char* kArithmetics[] = {"auto", "winograd", "direct"};
  constexpr const char* kInstructionSets[] = {"auto", "portable", "avx2", "avx512", "neon"};
  const bool own = without_python(backend, kOwn, x.scalar_type() != ScalarType::Double) == kOwn;
  const char* const arithmetic = "RES2NET_FUSED_CPU_ARITHMETIC";
  const char* const instruction_set = "RES2NET_FUSED_CPU_ISA";
  return {
      own,
      {code_of(arithmetic, environment_or_auto(arithmetic), kArithmetics),
       code_of(instruction_set, environment_or_auto(instruction_set), kInstructionSets) - 1, 0, 0}};
}

// Python's output where it ran the call, else nothing, and then the decision.
template <class... T>
std::optional<Tensor> decide(
    Decision& decision, const char* name, const Tensor& x, const std::string& backend, const T&... arguments) {
  Key key(name, arguments...);
  if (const auto known = key.find(); known.has_value()) {
    decision = *known;
    return std::nullopt;
  }
  if (has_python()) {
    Answer answer = ask_python(name, kOwn, arguments...);
    if (!answer.outputs.empty()) return std::move(answer.outputs[0]);
    decision = answer.decision;
    STD_TORCH_CHECK(decision.own, name, ": Python neither ran the call nor left it to the CPU's kernels");
  } else {
    decision = decide_without_python(backend, x);
  }
  key.keep(decision);
  return std::nullopt;
}

// Whether x suggests channels-last, as memory_format in res2net_fused/chain/memory_format.py decides it.
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

// `out`, dense in the asked format; of one pixel or channel it is in both, and its strides say which.
Tensor unambiguous(const Tensor& out, bool channels_last) {
  const int64_t channels = out.size(1), height = out.size(2), width = out.size(3), image = channels * height * width;
  if (channels != 1 && height * width != 1) return out;
  const int64_t sizes[] = {out.size(0), channels, height, width};
  const int64_t last[] = {image, 1, width * channels, channels}, first[] = {image, height * width, width, 1};
  AtenTensorHandle view = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(out.get(), 4, sizes, channels_last ? last : first, 0, &view));
  return Tensor(view);
}

// `out` of PyTorch's operators.
Tensor with_format(const Tensor& out, bool channels_last) {
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return unambiguous(torch::stable::contiguous(out, format), channels_last);
}

#define R2N_VALUES_OF(p)                                                                                    \
  p.channels, p.steps, p.stride, p.dilation, p.groups, p.hierarchical, static_cast<int64_t>(p.passthrough), \
      static_cast<int64_t>(p.pool), static_cast<int64_t>(p.activation.kind), static_cast<double>(p.activation.slope)

bool covers_any_size(const ChainProblem& p) { return p.stride == 1 && p.dilation == 1 && p.groups == 1; }

Tensor hierarchical_conv2d(
    const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const OptionalTensors& packed,
    const std::string& layout, int64_t stride, int64_t dilation, int64_t groups, bool hierarchical,
    const std::string& passthrough, const OptionalString& pool, const std::string& activation, const std::string& backend) {
  Decision decision;
  if (auto out = decide(
          decision, "hierarchical_conv2d", x, backend, x, weights, biases, packed, layout, stride, dilation, groups,
          hierarchical, passthrough, pool, activation, backend)) {
    return *out;
  }
  const ChainNames names{stride, dilation, groups, hierarchical, passthrough, pool, activation};
  const bool last = suggests_channels_last(x);
  if (!decision.own) return with_format(plain_chain(x, weights, biases, names), last);
  const auto [arithmetic, instruction_set, from_weights] = settings_of(decision);
  const ChainProblem p = problem_named(x, weights, names);
  const bool is_packed = layout == kOwn && packed.has_value() && !packed->empty();
  Tensors plain_biases;
  if (!is_packed && biases.has_value()) {
    // The dispatcher looks into no Tensor[]?: a bias that is lazily negated comes as it is.
    for (const Tensor& bias : *biases) plain_biases.push_back(call_operator<Tensor>("aten::resolve_neg", "", bias));
  }
  if (!is_packed && from_weights) {
    const Tensors found = chain_from_weights(x, weights, plain_biases, false, R2N_VALUES_OF(p), last, instruction_set);
    if (!found.empty()) return unambiguous(found[0], last);
  }
  const Tensors own = is_packed ? *packed : pack(weights, plain_biases, groups, false, instruction_set);
  STD_TORCH_CHECK(own.size() == 3, "packed must be 3 tensors, not ", own.size());
  return unambiguous(chain_forward(x, own[0], own[1], own[2], R2N_VALUES_OF(p), last, arithmetic, instruction_set), last);
}

// As pack_block in res2net_fused/backends/cpu/block.py.
Tensors pack_block(
    const Tensor& conv1_weight, const Tensor& conv1_bias, const Tensors& weights, const Tensors& biases,
    const Tensor& conv3_weight, const Tensor& conv3_bias, const std::optional<Tensor>& projection_weight,
    const std::optional<Tensor>& projection_bias, const ChainProblem& p, int64_t instruction_set) {
  Tensors all = pack_pointwise(conv1_weight, conv1_bias, instruction_set);
  Tensor bias = conv3_bias, projection = new_floats(0, 0);
  if (projection_weight.has_value() && projection_bias.has_value()) {
    projection = pack_pointwise(*projection_weight, *projection_bias, instruction_set)[0];
    bias = plain_sum(bias, *projection_bias);
  }
  const Tensors conv3 = pack_pointwise(conv3_weight, bias, instruction_set);
  const Tensors chain = pack(weights, biases, p.groups, covers_any_size(p), instruction_set);
  all.insert(all.end(), conv3.begin(), conv3.end());
  all.push_back(projection);
  all.insert(all.end(), chain.begin(), chain.end());
  return all;
}

Tensor bottle2neck(
    const Tensor& x, const std::optional<Tensor>& shortcut, const Tensor& conv1_weight, const Tensor& conv1_bias,
    const Tensors& weights, const Tensors& biases, const Tensor& conv3_weight, const Tensor& conv3_bias,
    const std::optional<Tensor>& projection_weight, const std::optional<Tensor>& projection_bias, int64_t projection_stride,
    const OptionalTensors& packed, const std::string& layout, bool relu, int64_t stride, int64_t dilation, int64_t groups,
    bool hierarchical, const std::string& passthrough, const OptionalString& pool, const std::string& activation,
    const std::string& backend) {
  Decision decision;
  if (auto out = decide(
          decision, "bottle2neck", x, backend, x, shortcut, conv1_weight, conv1_bias, weights, biases, conv3_weight, conv3_bias,
          projection_weight, projection_bias, projection_stride, packed, layout, relu, stride, dilation, groups, hierarchical,
          passthrough, pool, activation, backend)) {
    return *out;
  }
  const ChainNames names{stride, dilation, groups, hierarchical, passthrough, pool, activation};
  const bool last = suggests_channels_last(x), projects = projection_weight.has_value() && projection_bias.has_value();
  if (!decision.own) {
    const Tensor u = plain_relu(plain_pointwise(x, conv1_weight, conv1_bias, 1));
    Tensor out = plain_pointwise(plain_chain(u, weights, biases, names), conv3_weight, conv3_bias, 1);
    if (shortcut.has_value()) {
      out = plain_sum(
          out, projects ? plain_pointwise(*shortcut, *projection_weight, *projection_bias, projection_stride) : *shortcut);
    }
    return with_format(relu ? plain_relu(out) : out, last);
  }
  const auto [arithmetic, instruction_set, _] = settings_of(decision);
  const ChainProblem p = problem_named(x, weights, names);
  const bool is_packed = layout == kOwn && packed.has_value() && !packed->empty();
  const Tensors own = is_packed ? *packed
                                : pack_block(
                                      conv1_weight, conv1_bias, weights, biases, conv3_weight, conv3_bias, projection_weight,
                                      projection_bias, p, instruction_set);
  const Tensor out = block_forward(
      x, shortcut, own, conv3_weight.size(0), projection_stride, relu, R2N_VALUES_OF(p), last, arithmetic, instruction_set);
  return unambiguous(out, last);
}

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_IMPL(res2net_fused, CPU, m) {
  m.impl("hierarchical_conv2d", TORCH_BOX(&res2net_fused::hierarchical_conv2d));
  m.impl("bottle2neck", TORCH_BOX(&res2net_fused::bottle2neck));
}
