// The bodies of the operators of res2net_fused on CUDA devices. A kernel is launched only as Python said it after it had agreed
// with float64; without Python PyTorch's operators run. Nothing waits for the device, so that calls can be captured into a graph.
#include "operators/bodies.h"

#include <torch/csrc/stable/library.h>

#include <limits>

#include "cuda/chain/native_calls.h"

namespace res2net_fused {
namespace {

constexpr const char* kNotCompared =
    "its kernels are compared with float64 before their first use, by Python, which is not here";

Tensor empty_nhwc(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  const int64_t sizes[4] = {like.size(0), channels, height, width};
  return torch::stable::empty(
      {sizes, 4}, like.scalar_type(), std::nullopt, like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

Tensor channels_last_of(const Tensor& t) { return torch::stable::contiguous(t, MemoryFormat::ChannelsLast); }

// weight: (channels, depth), as pack_block lays it out.
Tensor pointwise(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t depth = weight.size(1);
  return plain_pointwise(x, reinterpreted(weight, {weight.size(0), depth, 1, 1}, {depth, 1, 1, 1}, 0), bias, 1);
}

struct Cuda {
  static constexpr const char* kOwn = "cuda";

  // Kernels have other paths for other alignments.
  static int64_t beside(const Tensor& x, const std::optional<Tensor>& shortcut) {
    const auto alignment = [](const Tensor& t) { return reinterpret_cast<intptr_t>(t.const_data_ptr()) & 15; };
    return alignment(x) << 4 | (shortcut.has_value() ? alignment(*shortcut) : 0);
  }

  static Decision rule(const std::string& backend, const Tensor&) {
    return {own_without_python(backend, kOwn, kNotCompared), {}};
  }

  static Decision rule_1d(const std::string& backend, const Tensor& x) { return rule(backend, x); }

  // The settings of a decision: `native_settings` in res2net_fused/backends/cuda/chain.py has the same order. The first is how far
  // x's pixels lie apart, of a block how far the groups in it; the last, whether the launch may overlap the one before.
  static void launch(
      const Decision& decision, const ChainNames& names, const ChainProblem& p, const Tensor& weight, const Tensor& bias,
      const Tensor& x, int64_t x_pixel, const Tensor& out, int64_t slot, int64_t passed, bool weights_stand) {
    const auto& [_, s] = decision;
    const Activation::Kind kind = p.activation.kind;
    STD_TORCH_CHECK(
        p.activation.clamps() && p.groups == 1 && p.pool != Pool::max3,
        "activation, groups or pool are none that this kernel has");
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const double lower = kind == Activation::none ? -kInfinity : 0;
    const double upper = kind == Activation::hardtanh20 ? 20 : kind == Activation::relu6 ? 6 : kInfinity;
    cuda::cuda_chain(
        x, weight, bias, out, s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], p.channels, p.steps,
        p.stride, p.dilation, p.hierarchical, p.first_convolved(), passed, static_cast<int64_t>(p.pool), x_pixel, slot,
        out.size(1), slot, slot, p.passthrough == Passthrough::first_added, s[13] != 0, weights_stand, lower, upper);
  }

  static Tensor chain(
      const Decision& decision, const Tensor& x, const Tensors& weights, const OptionalTensors&, const Tensors* packed,
      const ChainNames& names, bool last) {
    STD_TORCH_CHECK(packed != nullptr && packed->size() == 2, "packed must be 2 tensors in this backend's layout");
    const ChainProblem p = problem_named(x, weights, names);
    const int64_t pitch = decision.settings[0];
    const Tensor source =
        pitch > 0 ? x : call_operator<Tensor>("aten::clone", "", x, std::optional(MemoryFormat::ChannelsLast));
    const Tensor out = empty_nhwc(x, x.size(1), p.out_height(), p.out_width());
    launch(
        decision, names, p, (*packed)[0], (*packed)[1], source, pitch > 0 ? pitch : x.size(1), out, p.channels,
        p.passed_group(), false);
    return last ? out : torch::stable::contiguous(out);
  }

  // As block_forward in res2net_fused/backends/cuda/block.py where Triton cannot be used: 1x1 convolutions are PyTorch's.
  static Tensor block(
      const Decision& decision, const BlockTensors& block, const Tensors* packed, bool relu, const ChainNames& names,
      bool last) {
    STD_TORCH_CHECK(packed != nullptr && packed->size() == 6, "packed must be 6 tensors in this backend's layout");
    const Tensors& own = *packed;
    const Tensor x = channels_last_of(block.x);
    const ChainProblem p = problem_named(x, block.weights, names);
    const int64_t slot = decision.settings[0], channels = p.scale() * slot;
    Tensor u = channels_last_of(plain_relu(pointwise(x, own[0], own[1])));  // (N, s*slot, H, W)
    STD_TORCH_CHECK(
        slot >= p.channels && u.size(1) == channels, "packed: conv1 is not that of ", p.scale(), " slots of ", slot);
    if (slot > p.channels) {
      // Exact zeros, also where x is not finite.
      Tensor padding =
          reinterpreted(u, {p.batch * p.height * p.width, p.scale(), slot - p.channels}, {channels, slot, 1}, p.channels);
      torch::stable::zero_(padding);
    }
    const Tensor y = empty_nhwc(u, channels, p.out_height(), p.out_width());
    // A group that passes as it is is the first of conv1's: the chain does not see it.
    const bool beside = p.passthrough == Passthrough::last && p.pool == Pool::none;
    const int64_t pixels = p.batch * p.height * p.width, row = p.width * channels;
    if (beside) {
      Tensor passed = reinterpreted(y, {pixels, slot}, {channels, 1}, channels - slot);
      torch::stable::copy_(passed, reinterpreted(u, {pixels, slot}, {channels, 1}, 0));
    }
    const Tensor source =
        beside ? reinterpreted(u, {p.batch, channels - slot, p.height, p.width}, {p.height * row, 1, row, channels}, slot) : u;
    launch(decision, names, p, own[4], own[5], source, channels, y, slot, beside ? -1 : p.passed_group(), true);
    const Tensor out = plain_end(pointwise(y, own[2], own[3]), block, relu);
    return torch::stable::contiguous(out, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

  // There are no kernels for rows.
  static Tensors rows(const Decision&, const RowsChain& chain, const OptionalTensors&) {
    return plain_hierarchical_conv1d(chain);
  }
};

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_IMPL(res2net_fused, CUDA, m) { RES2NET_IMPLEMENT_BODIES(m, res2net_fused::Bodies<res2net_fused::Cuda>); }
