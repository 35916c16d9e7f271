// The bodies of the operators of res2net_fused on the CPU. What the kernels need to stay inside their memory is checked here too.
#include "operators/bodies.h"

#include <torch/csrc/stable/library.h>

#include "cpu/ops/native_calls.h"

namespace res2net_fused {
namespace {

#define R2N_VALUES_OF(p)                                                                                    \
  p.channels, p.steps, p.stride, p.dilation, p.groups, p.hierarchical, static_cast<int64_t>(p.passthrough), \
      static_cast<int64_t>(p.pool), static_cast<int64_t>(p.activation.kind), static_cast<double>(p.activation.slope)

struct Cpu {
  static constexpr const char* kOwn = "cpu";

  // The settings of a decision: `native_settings` in res2net_fused/backends/cpu/chain.py has the same order.
  struct Settings {
    int64_t arithmetic, instruction_set;
    bool from_weights;  // of a chain that is not packed: Winograd's weights are packed in the call
  };

  static Settings settings_of(const Decision& decision) {
    return {decision.settings[0], decision.settings[1], decision.settings[2] != 0};
  }

  static int64_t beside(const Tensor&, const std::optional<Tensor>&) { return 0; }

  static Decision rule(const std::string& backend, const Tensor& x) {
    constexpr const char* kArithmetics[] = {"auto", "winograd", "direct"};
    constexpr const char* kInstructionSets[] = {"auto", "portable", "avx2", "avx512", "neon"};
    const bool known = x.scalar_type() != ScalarType::Double;
    const char* const why_not = known ? nullptr : "x is torch.float64; allowed are float32, float16 and bfloat16";
    const char* const arithmetic = "RES2NET_FUSED_CPU_ARITHMETIC";
    const char* const instruction_set = "RES2NET_FUSED_CPU_ISA";
    return {
        own_without_python(backend, kOwn, why_not),
        {code_of(arithmetic, environment_or_auto(arithmetic), kArithmetics),
         code_of(instruction_set, environment_or_auto(instruction_set), kInstructionSets) - 1}};
  }

  static Decision rule_1d(const std::string& backend, const Tensor& x) {
    const bool own = own_without_python(backend, kOwn, nullptr);
    return {own && knows_rows_of(x), {multiplies_rows(x.size(0) * x.size(2))}};
  }

  static Tensor chain(
      const Decision& decision, const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const Tensors* packed,
      const ChainNames& names, bool last) {
    const auto [arithmetic, instruction_set, from_weights] = settings_of(decision);
    const ChainProblem p = problem_named(x, weights, names);
    Tensors plain_biases;
    if (packed == nullptr && biases.has_value()) {
      // The dispatcher looks into no Tensor[]?: a bias that is lazily negated comes as it is.
      for (const Tensor& bias : *biases) plain_biases.push_back(call_operator<Tensor>("aten::resolve_neg", "", bias));
    }
    if (packed == nullptr && from_weights) {
      const Tensors found = chain_from_weights(x, weights, plain_biases, false, R2N_VALUES_OF(p), last, instruction_set);
      if (!found.empty()) return found[0];
    }
    const Tensors own = packed != nullptr ? *packed : pack(weights, plain_biases, p.groups, false, instruction_set);
    STD_TORCH_CHECK(own.size() == 3, "packed must be 3 tensors, not ", own.size());
    return chain_forward(x, own[0], own[1], own[2], R2N_VALUES_OF(p), last, arithmetic, instruction_set);
  }

  // As pack_block in res2net_fused/backends/cpu/block.py.
  static Tensors pack_block(const BlockTensors& block, const ChainProblem& p, int64_t instruction_set) {
    Tensors all = pack_pointwise(block.conv1_weight, block.conv1_bias, instruction_set);
    Tensor bias = block.conv3_bias, projection = new_floats(0, 0);
    if (block.projects()) {
      projection = pack_pointwise(*block.projection_weight, *block.projection_bias, instruction_set)[0];
      bias = plain_sum(bias, *block.projection_bias);
    }
    const bool covers_any_size = p.stride == 1 && p.dilation == 1 && p.groups == 1;
    const Tensors conv3 = pack_pointwise(block.conv3_weight, bias, instruction_set);
    const Tensors chain = pack(block.weights, block.biases, p.groups, covers_any_size, instruction_set);
    all.insert(all.end(), conv3.begin(), conv3.end());
    all.push_back(projection);
    all.insert(all.end(), chain.begin(), chain.end());
    return all;
  }

  static Tensor block(
      const Decision& decision, const BlockTensors& block, const Tensors* packed, bool relu, const ChainNames& names,
      bool last) {
    const auto [arithmetic, instruction_set, _] = settings_of(decision);
    const ChainProblem p = problem_named(block.x, block.weights, names);
    const Tensors own = packed != nullptr ? Tensors{} : pack_block(block, p, instruction_set);
    return block_forward(
        block.x, block.shortcut, packed_block(packed != nullptr ? *packed : own),
        block.conv3_weight.size(0), block.projection_stride, relu, R2N_VALUES_OF(p), last, arithmetic, instruction_set);
  }

  static Tensor gathered(
      const Decision& decision, const Tensor& x, const std::optional<Tensor>& shortcut, const Tensor& memory, bool relu,
      const ChainNames& names, bool last) {
    const auto [arithmetic, instruction_set, _] = settings_of(decision);
    const GatheredBlock found = gathered_block(memory);
    const ChainProblem p = problem_named(x, found.channels, found.steps, names);
    return block_forward(
        x, shortcut, found.weights, found.outplanes, found.projection_stride, relu, R2N_VALUES_OF(p), last, arithmetic,
        instruction_set);
  }

  static Tensors rows(const Decision& decision, const RowsChain& chain, const OptionalTensors& packed) {
    return rows_forward(chain, packed, decision.settings[0] != 0);
  }
};

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_IMPL(res2net_fused, CPU, m) {
  using Bodies = res2net_fused::Bodies<res2net_fused::Cpu>;
  RES2NET_IMPLEMENT_BODIES(m, Bodies);
  m.impl("frozen_bottle2neck", TORCH_BOX(&Bodies::frozen_bottle2neck));
}
