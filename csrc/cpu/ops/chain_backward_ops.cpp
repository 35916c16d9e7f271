// torch.ops.res2net_fused_native.cpu_chain_backward: the backward of the chain without batch statistics in one call.
#include <torch/csrc/stable/library.h>

#include "cpu/chain/backward.h"
#include "cpu/chain/weight_gradients.h"
#include "cpu/ops/op_arguments.h"

namespace res2net_fused {
namespace {

ConstView pixels_of(const Tensor& t) {
  return {static_cast<const float*>(t.const_data_ptr()), t.stride(0), t.stride(2), t.stride(3)};
}

void check_shape(const Tensor& t, const char* name, const ChainProblem& problem) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 4 && t.size(0) == problem.batch &&
          t.size(1) == problem.scale() * problem.channels && t.size(2) == problem.height && t.size(3) == problem.width &&
          (t.stride(1) == 1 || t.size(1) == 1),
      name, " must be fp32 and channels-last, of (", problem.batch, ", ", problem.scale() * problem.channels, ", ",
      problem.height, ", ", problem.width, ")");
}

// [gradient of x, its passed group not written; then, where asked for, those of the weights, and as many of the biases].
// Nothing where this is not for the problem or a gradient is not finite.
std::vector<Tensor> chain_backward(
    const Tensor& grad, const Tensor& x, const Tensor& out, const std::vector<Tensor>& weights, RES2NET_PARAMETERS(R2N_CHAIN),
    bool need_x, bool need_weights, bool channels_last_weights, int64_t instruction_set) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be a four-dimensional tensor");
  const ChainProblem problem = problem_of(x.size(0), x.size(2), x.size(3), RES2NET_VALUES(R2N_CHAIN));
  activation_read_off(activation, slope);  // checks that it can be
  const int64_t threads = torch::stable::get_num_threads();
  if (!backward_covers(problem, threads)) return {};
  check_shape(grad, "grad", problem);
  check_shape(x, "x", problem);
  check_shape(out, "out", problem);
  const Kernels& kernels = kernels_of(instruction_set);
  const BackwardPlan plan = plan_backward(problem, threads);
  std::vector<Tensor> plain;
  std::vector<WeightView> views;
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == steps, "one weight for each of ", steps, " convolutions is needed");
  for (const Tensor& weight : weights) views.push_back(weight_view(weight, channels, plain).turned());

  const Tensor grad_x = empty_nhwc(problem.batch, x.size(1), problem.height, problem.width);
  std::vector<WeightGradients> gradients;
  for (int64_t i = 0; need_weights && i < steps; i++) gradients.emplace_back(channels, channels_last_weights);
  BackwardData data{};
  data.x = pixels_of(x);
  data.out = pixels_of(out);
  data.grad = pixels_of(grad);
  data.grad_x = {
      static_cast<float*>(grad_x.mutable_data_ptr()), problem.height * problem.width * x.size(1), problem.width * x.size(1),
      x.size(1)};
  data.room = x.size(1);
  data.weights = views.data();
  data.gradients = need_weights ? gradients.data() : nullptr;
  if (!run_backward(problem, plan, data, need_x, kernels)) return {};
  std::vector<Tensor> results{grad_x};
  for (const WeightGradients& g : gradients) results.push_back(g.weights);
  for (const WeightGradients& g : gradients) results.push_back(g.bias);
  return results;
}

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def(
      "cpu_chain_backward(Tensor grad, Tensor x, Tensor out, Tensor[] weights, "  //
      RES2NET_SCHEMA(R2N_CHAIN) ", bool need_x, "
      "bool need_weights, bool channels_last_weights, int instruction_set) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CPU, m) {
  m.impl("cpu_chain_backward", TORCH_BOX(&res2net_fused::chain_backward));
}
