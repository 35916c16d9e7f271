// torch.ops.res2net_fused_native.cpu_*: the chain's forward, its packed weights, and what is planned.
// res2net_fused/backends/native_cpu.py calls them with arguments that are checked already; what is checked here keeps a
// wrong call from touching memory that is not its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/arena.h"
#include "cpu/chain_plan.h"
#include "cpu/chain_run.h"
#include "cpu/dispatch.h"

namespace res2net_fused {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& kernels_of(int64_t instruction_set) {
  const Kernels* kernels = find_kernels(static_cast<InstructionSet>(instruction_set));
  STD_TORCH_CHECK(kernels != nullptr, "instruction_set ", instruction_set, " is not available on this machine");
  return *kernels;
}

// The size of a packed weight buffer or bias, and that it is what the kernels read.
void check_packed(const Tensor& tensor, const char* name, int64_t floats) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == floats,
      name, " must be ", floats, " contiguous floats on the CPU as cpu_pack returns them; it has ", tensor.numel(),
      " elements");
}

// x with its channels side by side, in fp32.
Tensor as_nhwc_floats(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float) {
    return torch::stable::to(
        x, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt, false, false, MemoryFormat::ChannelsLast);
  }
  if (x.stride(1) == 1 || x.size(1) == 1) return x;
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

Tensor chain_forward(
    const Tensor& x_given, const Tensor& winograd, const Tensor& direct, const Tensor& bias, int64_t channels, int64_t steps,
    int64_t stride, int64_t dilation, int64_t groups, bool hierarchical, int64_t passthrough, int64_t pool,
    int64_t activation, bool channels_last, int64_t arithmetic, int64_t instruction_set) {
  STD_TORCH_CHECK(x_given.is_cpu() && x_given.dim() == 4, "x must be a four-dimensional tensor on the CPU");
  const Tensor x = as_nhwc_floats(x_given);
  const ChainProblem problem{
      x.size(0), x.size(2), x.size(3), channels, steps, stride, dilation, groups, hierarchical,
      static_cast<Passthrough>(passthrough), static_cast<Pool>(pool), static_cast<Activation>(activation)};
  STD_TORCH_CHECK(
      channels >= 1 && steps >= 1 && stride >= 1 && dilation >= 1 && groups >= 1 && channels % groups == 0 &&
          x.size(1) == problem.scale() * channels && problem.height >= 1 && problem.width >= 1,
      "x has ", x.size(1), " channels, which do not fit ", steps, " convolutions of ", channels, " channels");
  const Kernels& kernels = kernels_of(instruction_set);
  const bool has_winograd = winograd.numel() > 0;
  check_packed(direct, "direct", steps * groups * direct_group_floats(channels / groups));
  check_packed(bias, "bias", steps * bias_floats(channels));
  if (has_winograd) check_packed(winograd, "winograd", steps * winograd_floats(channels));

  const auto choice = has_winograd ? static_cast<ArithmeticChoice>(arithmetic) : ArithmeticChoice::direct;
  const ChainPlan plan = plan_chain(problem, choice, torch::stable::get_num_threads());
  const int64_t height = problem.out_height(), width = problem.out_width(), all_channels = x.size(1);
  const int64_t sizes[4] = {problem.batch, all_channels, height, width};
  Tensor out = torch::stable::empty(
      {sizes, 4}, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt, MemoryFormat::ChannelsLast);
  if (problem.batch > 0) {
    ChainData data{};
    data.x = {static_cast<const float*>(x.const_data_ptr()), x.stride(0), x.stride(2), x.stride(3)};
    data.out = {
        static_cast<float*>(out.mutable_data_ptr()), height * width * all_channels, width * all_channels, all_channels};
    data.winograd = has_winograd ? static_cast<const float*>(winograd.const_data_ptr()) : nullptr;
    data.direct = static_cast<const float*>(direct.const_data_ptr());
    data.bias = static_cast<const float*>(bias.const_data_ptr());
    run_chain(problem, plan, data, kernels);
  }
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  if (x_given.scalar_type() != ScalarType::Float) {
    return torch::stable::to(
        out, x_given.scalar_type(), std::nullopt, std::nullopt, std::nullopt, false, false, format);
  }
  return channels_last ? out : torch::stable::contiguous(out, format);
}

// [Winograd weights (steps, ...) or an empty tensor, direct weights, biases], all fp32.
std::vector<Tensor> pack(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, int64_t groups, bool with_winograd,
    int64_t instruction_set) {
  STD_TORCH_CHECK(!weights.empty() && groups >= 1, "weights is empty");
  const Kernels& kernels = kernels_of(instruction_set);
  const int64_t steps = static_cast<int64_t>(weights.size()), channels = weights[0].size(0);
  const int64_t group_channels = channels / groups;
  const auto new_floats = [](int64_t rows, int64_t floats) {
    const int64_t sizes[2] = {rows, floats};
    return torch::stable::empty({sizes, 2}, ScalarType::Float);
  };
  Tensor winograd = new_floats(with_winograd ? steps : 0, winograd_floats(channels));
  Tensor direct = new_floats(steps, groups * direct_group_floats(group_channels));
  Tensor bias = new_floats(steps, bias_floats(channels));
  torch::stable::zero_(bias);

  std::vector<Tensor> plain;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(
        weight.is_cpu() && weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == group_channels &&
            group_channels * groups == channels && weight.size(2) == 3 && weight.size(3) == 3,
        "every weight must be (", channels, ", ", group_channels, ", 3, 3)");
    plain.push_back(torch::stable::contiguous(torch::stable::to(weight, ScalarType::Float)));
  }
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "one bias per weight is needed");
  for (size_t i = 0; i < biases.size(); i++) {
    STD_TORCH_CHECK(biases[i].is_cpu() && biases[i].numel() == channels, "every bias must hold ", channels, " elements");
    const Tensor plain_bias = torch::stable::contiguous(torch::stable::to(biases[i], ScalarType::Float));
    const float* from = static_cast<const float*>(plain_bias.const_data_ptr());
    float* to = static_cast<float*>(bias.mutable_data_ptr()) + static_cast<int64_t>(i) * bias_floats(channels);
    for (int64_t c = 0; c < channels; c++) to[c] = from[c];
  }

  const int64_t panels = panel_count(channels), direct_panels = groups * panel_count(group_channels);
  float* const u = static_cast<float*>(winograd.mutable_data_ptr());
  float* const d = static_cast<float*>(direct.mutable_data_ptr());
  ask_for_huge_pages(u, winograd.numel() * static_cast<int64_t>(sizeof(float)));
  torch::stable::parallel_for(0, steps * direct_panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; item++) {
      const int64_t step = item / direct_panels, panel = item % direct_panels;
      const float* from = static_cast<const float*>(plain[static_cast<size_t>(step)].const_data_ptr());
      kernels.pack_direct(
          from, channels, groups, d + step * groups * direct_group_floats(group_channels), panel, panel + 1);
      if (with_winograd && panel < panels) {
        kernels.pack_winograd(from, channels, u + step * winograd_floats(channels), panel, panel + 1);
      }
    }
  });
  return {winograd, direct, bias};
}

std::string plan_text(
    int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t steps, int64_t stride, int64_t dilation,
    int64_t groups, bool hierarchical, int64_t passthrough, int64_t pool, int64_t activation, int64_t arithmetic,
    int64_t instruction_set) {
  const ChainProblem problem{
      batch, height, width, channels, steps, stride, dilation, groups, hierarchical,
      static_cast<Passthrough>(passthrough), static_cast<Pool>(pool), static_cast<Activation>(activation)};
  const ChainPlan plan =
      plan_chain(problem, static_cast<ArithmeticChoice>(arithmetic), torch::stable::get_num_threads());
  return describe(problem, plan, kernels_of(instruction_set));
}

bool has_instruction_set(int64_t instruction_set) {
  return find_kernels(static_cast<InstructionSet>(instruction_set)) != nullptr;
}

int64_t scratch_bytes(bool release) { return cached_scratch_bytes(release); }

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def(
      "cpu_chain_forward(Tensor x, Tensor winograd, Tensor direct, Tensor bias, int channels, int steps, int stride, "
      "int dilation, int groups, bool hierarchical, int passthrough, int pool, int activation, bool channels_last, "
      "int arithmetic, int instruction_set) -> Tensor");
  m.def("cpu_pack(Tensor[] weights, Tensor[] biases, int groups, bool with_winograd, int instruction_set) -> Tensor[]");
  m.def(
      "cpu_plan(int batch, int height, int width, int channels, int steps, int stride, int dilation, int groups, "
      "bool hierarchical, int passthrough, int pool, int activation, int arithmetic, int instruction_set) -> str");
  m.def("cpu_has_instruction_set(int instruction_set) -> bool");
  m.def("cpu_scratch_bytes(bool release) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CPU, m) {
  m.impl("cpu_chain_forward", TORCH_BOX(&res2net_fused::chain_forward));
  m.impl("cpu_pack", TORCH_BOX(&res2net_fused::pack));
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_plan", TORCH_BOX(&res2net_fused::plan_text));
  m.impl("cpu_has_instruction_set", TORCH_BOX(&res2net_fused::has_instruction_set));
  m.impl("cpu_scratch_bytes", TORCH_BOX(&res2net_fused::scratch_bytes));
}
