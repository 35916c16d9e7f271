// torch.ops.res2net_fused_native.cpu_*: the chain's forward, its packed weights, and what is planned.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/chain/forward.h"
#include "cpu/ops/native_calls.h"
#include "cpu/runtime/scratch.h"

namespace res2net_fused {
namespace {

ChainProblem problem_for(const Tensor& x, RES2NET_PARAMETERS(R2N_CHAIN)) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "x must be a four-dimensional tensor on the CPU");
  const ChainProblem problem = problem_of(x.size(0), x.size(2), x.size(3), RES2NET_VALUES(R2N_CHAIN));
  STD_TORCH_CHECK(
      x.size(1) == problem.scale() * problem.channels, "x has ", x.size(1), " channels, which do not fit ", problem.steps,
      " convolutions of ", problem.channels, " channels");
  return problem;
}

// x through the chain into `out`, both channels-last; data has the weights. False as run_chain.
bool run_over(
    const Tensor& x, const Tensor& out, const ChainProblem& problem, const ChainPlan& plan, ChainData data,
    const Kernels& kernels) {
  if (problem.batch == 0) return true;
  const int64_t row = problem.out_width() * x.size(1);
  data.x = {static_cast<const float*>(x.const_data_ptr()), x.stride(0), x.stride(2), x.stride(3)};
  data.out = {static_cast<float*>(out.mutable_data_ptr()), problem.out_height() * row, row, x.size(1)};
  data.room = x.size(1);
  return run_chain(problem, plan, data, kernels);
}

Tensor output_of(const ChainProblem& problem) {
  return empty_nhwc(problem.batch, problem.scale() * problem.channels, problem.out_height(), problem.out_width());
}

}  // namespace

Tensor chain_forward(
    const Tensor& x_given, const Tensor& winograd, const Tensor& direct, const Tensor& bias, RES2NET_PARAMETERS(R2N_CHAIN),
    bool channels_last, int64_t arithmetic, int64_t instruction_set) {
  const ChainProblem problem = problem_for(x_given, RES2NET_VALUES(R2N_CHAIN));
  ChainData data{};
  data.winograd = packed_floats(winograd, "winograd", steps * winograd_floats(channels), true);
  data.direct = packed_floats(direct, "direct", steps * groups * direct_group_floats(channels / groups));
  data.bias = packed_floats(bias, "bias", steps * bias_floats(channels));
  const auto choice = data.winograd ? static_cast<ArithmeticChoice>(arithmetic) : ArithmeticChoice::direct;
  const ChainPlan plan = plan_chain(problem, choice, torch::stable::get_num_threads());
  const Tensor out = output_of(problem);
  run_over(as_nhwc_floats(x_given), out, problem, plan, data, kernels_of(instruction_set));
  return as_asked(out, x_given.scalar_type(), channels_last);
}

// The chain by Winograd from weights (w, w, 3, 3) as they are; `turned`: by those of the input gradient. Returns nothing where
// a result is not finite, since only direct convolution says which ones are.
std::vector<Tensor> chain_from_weights(
    const Tensor& x_given, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, bool turned,
    RES2NET_PARAMETERS(R2N_CHAIN), bool channels_last, int64_t instruction_set) {
  const ChainProblem problem = problem_for(x_given, RES2NET_VALUES(R2N_CHAIN));
  STD_TORCH_CHECK(
      winograd_covers(problem) && static_cast<int64_t>(weights.size()) == steps,
      "Winograd needs stride, dilation and groups of 1, images of 2 x 2 pixels and one weight for each of ", steps,
      " convolutions");
  std::vector<Tensor> plain;
  std::vector<WeightView> views;
  for (const Tensor& weight : weights) {
    const WeightView view = weight_view(weight, channels, plain);
    views.push_back(turned ? view.turned() : view);
  }
  const Kernels& kernels = kernels_of(instruction_set);
  const Tensor bias = pack_biases(biases, steps, channels), out = output_of(problem);
  ChainData data{};
  data.bias = static_cast<const float*>(bias.const_data_ptr());
  const ChainPlan plan = plan_from_weights(problem, torch::stable::get_num_threads());
  const bool ahead = plan.schedule != Schedule::channels;
  const Scratch packed(ahead ? steps * winograd_floats(channels) : 0);
  if (ahead) {
    pack_ahead(views.data(), steps, channels, packed.data(), kernels);
    data.winograd = packed.data();
  } else {
    data.plain = views.data();
  }
  if (!run_over(as_nhwc_floats(x_given), out, problem, plan, data, kernels)) return {};
  return {as_asked(out, x_given.scalar_type(), channels_last)};
}

// [Winograd weights (steps, ...) or an empty tensor, direct weights, biases], all fp32.
std::vector<Tensor> pack(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, int64_t groups, bool with_winograd,
    int64_t instruction_set) {
  STD_TORCH_CHECK(!weights.empty() && groups >= 1, "weights is empty");
  const Kernels& kernels = kernels_of(instruction_set);
  const int64_t steps = static_cast<int64_t>(weights.size()), channels = weights[0].size(0);
  STD_TORCH_CHECK(channels % groups == 0, "groups must divide ", channels, " channels, which ", groups, " does not");
  const int64_t group_channels = channels / groups;
  Tensor winograd = new_floats(with_winograd ? steps : 0, winograd_floats(channels));
  Tensor direct = new_floats(steps, groups * direct_group_floats(group_channels));

  std::vector<Tensor> plain;
  for (const Tensor& weight : weights) {
    check_weight(weight, channels, group_channels);
    plain.push_back(torch::stable::contiguous(torch::stable::to(weight, ScalarType::Float)));
  }

  const int64_t panels = panel_count(channels), direct_panels = groups * panel_count(group_channels);
  float* const u = static_cast<float*>(winograd.mutable_data_ptr());
  float* const d = static_cast<float*>(direct.mutable_data_ptr());
  ask_for_huge_pages(u, winograd.numel() * static_cast<int64_t>(sizeof(float)));
  torch::stable::parallel_for(0, steps * direct_panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; item++) {
      const int64_t step = item / direct_panels, panel = item % direct_panels;
      const float* from = static_cast<const float*>(plain[static_cast<size_t>(step)].const_data_ptr());
      kernels.pack_direct(from, channels, groups, d + step * groups * direct_group_floats(group_channels), panel, panel + 1);
      if (with_winograd && panel < panels) {
        const WeightView view{from, channels * 9, 9, 3, 1};
        const int64_t at = step * winograd_floats(channels) + panel * kPanel * channels;
        kernels.pack_winograd(view, channels, u + at, winograd_point(channels), panel, panel + 1);
      }
    }
  });
  return {winograd, direct, pack_biases(biases, steps, channels)};
}

namespace {

std::string plan_text(
    int64_t batch, int64_t height, int64_t width, RES2NET_PARAMETERS(R2N_CHAIN), int64_t arithmetic, int64_t instruction_set) {
  const ChainProblem problem = problem_of(batch, height, width, RES2NET_VALUES(R2N_CHAIN));
  const ChainPlan plan = plan_chain(problem, static_cast<ArithmeticChoice>(arithmetic), torch::stable::get_num_threads());
  const Kernels& kernels = kernels_of(instruction_set);
  const int64_t barriers = chain_barriers(problem, plan, kernels);
  std::string text = describe(problem, plan, kernels);
  if (barriers > 0) text += ", " + std::to_string(barriers) + (barriers == 1 ? " barrier" : " barriers") + " in its chain";
  return text;
}

bool has_instruction_set(int64_t instruction_set) {
  return find_kernels(static_cast<InstructionSet>(instruction_set)) != nullptr;
}

int64_t scratch_bytes(bool release) { return cached_scratch_bytes(release); }

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def(
      "cpu_chain_forward(Tensor x, Tensor winograd, Tensor direct, Tensor bias, "  //
      RES2NET_SCHEMA(R2N_CHAIN) ", bool channels_last, int arithmetic, int instruction_set) -> Tensor");
  m.def(
      "cpu_chain_from_weights(Tensor x, Tensor[] weights, Tensor[] biases, bool turned, "  //
      RES2NET_SCHEMA(R2N_CHAIN) ", bool channels_last, int instruction_set) -> Tensor[]");
  m.def("cpu_pack(Tensor[] weights, Tensor[] biases, int groups, bool with_winograd, int instruction_set) -> Tensor[]");
  m.def(
      "cpu_plan(int batch, int height, int width, " RES2NET_SCHEMA(R2N_CHAIN) ", int arithmetic, int instruction_set) -> str");
  m.def("cpu_has_instruction_set(int instruction_set) -> bool");
  m.def("cpu_scratch_bytes(bool release) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CPU, m) {
  m.impl("cpu_chain_forward", TORCH_BOX(&res2net_fused::chain_forward));
  m.impl("cpu_chain_from_weights", TORCH_BOX(&res2net_fused::chain_from_weights));
  m.impl("cpu_pack", TORCH_BOX(&res2net_fused::pack));
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_plan", TORCH_BOX(&res2net_fused::plan_text));
  m.impl("cpu_has_instruction_set", TORCH_BOX(&res2net_fused::has_instruction_set));
  m.impl("cpu_scratch_bytes", TORCH_BOX(&res2net_fused::scratch_bytes));
}
