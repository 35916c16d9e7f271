// torch.ops.res2net_fused_native.cpu_block_forward and cpu_pack_pointwise: the whole block in eval mode.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/chain/block.h"
#include "cpu/ops/native_calls.h"
#include "cpu/runtime/scratch.h"

namespace res2net_fused {
namespace {

// x with dense pixels, one after the other.
Tensor as_dense_nhwc_floats(const Tensor& x) {
  return torch::stable::contiguous(as_nhwc_floats(x), MemoryFormat::ChannelsLast);
}

// The first words of the memory that weights are gathered in: `gather_block` in res2net_fused/backends/cpu/block.py writes them.
struct GatheredWords {
  int64_t version, bytes, channels, steps, outplanes, projection_stride;
  int64_t starts[kPackedPieces], counts[kPackedPieces];  // of the packed pieces: bytes from the first word on, and floats
};
constexpr int64_t kVersion = 1;

}  // namespace

PackedBlock packed_block(const std::vector<Tensor>& packed) {
  STD_TORCH_CHECK(packed.size() == kPackedPieces, "packed must be ", kPackedPieces, " tensors, not ", packed.size());
  PackedBlock found{};
  std::transform(packed.begin(), packed.end(), found.pieces.begin(), packed_in);
  return found;
}

GatheredBlock gathered_block(const Tensor& memory) {
  GatheredWords words;
  const bool holds = memory.is_cpu() && memory.scalar_type() == ScalarType::Byte && memory.is_contiguous() &&
                     memory.numel() >= static_cast<int64_t>(sizeof(words));
  const auto* const first = holds ? static_cast<const char*>(memory.const_data_ptr()) : nullptr;
  if (holds) std::memcpy(&words, first, sizeof(words));
  STD_TORCH_CHECK(
      holds && words.version == kVersion && words.bytes == memory.numel(),
      "memory must be a block's weights as `gather_block` in res2net_fused/backends/cpu/block.py lays them out");
  GatheredBlock found{words.channels, words.steps, words.outplanes, words.projection_stride, {}};
  for (size_t i = 0; i < kPackedPieces; i++) {
    const int64_t start = words.starts[i], count = words.counts[i], bytes = count * static_cast<int64_t>(sizeof(float));
    STD_TORCH_CHECK(
        start >= 0 && start % alignof(float) == 0 && count >= 0 && count <= words.bytes && start <= words.bytes - bytes,
        "memory ends before piece ", i, " of the weights in it");
    found.weights.pieces[i] = {reinterpret_cast<const float*>(first + start), count};
  }
  return found;
}

// With a projection, shortcut is what it reads, at every projection_stride-th pixel.
Tensor block_forward(
    const Tensor& x_given, const std::optional<Tensor>& shortcut_given, const PackedBlock& weights, int64_t outplanes,
    int64_t projection_stride, bool relu, RES2NET_PARAMETERS(R2N_CHAIN), bool channels_last, int64_t arithmetic,
    int64_t instruction_set) {
  STD_TORCH_CHECK(x_given.is_cpu() && x_given.dim() == 4, "x must be a four-dimensional tensor on the CPU");
  STD_TORCH_CHECK(outplanes >= 1, "outplanes must be 1 or more, not ", outplanes);
  const auto& packed = weights.pieces;
  const Tensor x = as_dense_nhwc_floats(x_given);
  const ChainProblem problem = problem_of(x.size(0), x.size(2), x.size(3), RES2NET_VALUES(R2N_CHAIN));
  const Kernels& kernels = kernels_of(instruction_set);
  const int64_t inplanes = x.size(1), middle = problem.scale() * channels;
  BlockData data{};
  data.inplanes = inplanes;
  data.outplanes = outplanes;
  data.relu = relu;
  data.conv1 = packed_floats(packed[0], "conv1", pointwise_floats(middle, inplanes));
  data.conv1_bias = packed_floats(packed[1], "conv1_bias", bias_floats(middle));
  data.conv3 = packed_floats(packed[2], "conv3", pointwise_floats(outplanes, middle));
  data.conv3_bias = packed_floats(packed[3], "conv3_bias", bias_floats(outplanes));
  data.winograd = packed_floats(packed[5], "winograd", steps * winograd_floats(channels), true);
  data.direct = packed_floats(packed[6], "direct", steps * groups * direct_group_floats(channels / groups));
  data.bias = packed_floats(packed[7], "bias", steps * bias_floats(channels));

  const int64_t height = problem.out_height(), width = problem.out_width();
  Tensor out = empty_nhwc(problem.batch, outplanes, height, width);
  Tensor shortcut;
  STD_TORCH_CHECK(shortcut_given.has_value() || packed[4].count == 0, "shortcut must be given beside a projection's weights");
  if (shortcut_given.has_value()) {
    shortcut = as_dense_nhwc_floats(*shortcut_given);
    const int64_t planes = shortcut.size(1);
    const bool projected = packed[4].count > 0;
    STD_TORCH_CHECK(
        shortcut.is_cpu() && projection_stride >= 1 && shortcut.size(0) == problem.batch &&
            (projected || planes == outplanes) && (shortcut.size(2) - 1) / projection_stride + 1 == height &&
            (shortcut.size(3) - 1) / projection_stride + 1 == width,
        "shortcut must be (", problem.batch, ", ", outplanes, ", ", height, ", ", width, ") on the CPU, after its projection");
    if (projected) data.projection = packed_floats(packed[4], "projection", pointwise_floats(outplanes, planes));
    data.shortcut_planes = planes;
    data.shortcut_height = shortcut.size(2);
    data.shortcut_width = shortcut.size(3);
    data.projection_stride = projection_stride;
    data.shortcut = static_cast<const float*>(shortcut.const_data_ptr());
  }
  if (problem.batch > 0) {
    data.x = static_cast<const float*>(x.const_data_ptr());
    data.out = static_cast<float*>(out.mutable_data_ptr());
    const auto choice = data.winograd ? static_cast<ArithmeticChoice>(arithmetic) : ArithmeticChoice::direct;
    run_block(problem, plan_chain(problem, choice, torch::stable::get_num_threads()), data, kernels);
  }
  return as_asked(out, x_given.scalar_type(), channels_last);
}

Tensor block_forward_of_tensors(
    const Tensor& x, std::optional<Tensor> shortcut, const std::vector<Tensor>& packed, int64_t outplanes,
    int64_t projection_stride, bool relu, RES2NET_PARAMETERS(R2N_CHAIN), bool channels_last, int64_t arithmetic,
    int64_t instruction_set) {
  return block_forward(
      x, shortcut, packed_block(packed), outplanes, projection_stride, relu, RES2NET_VALUES(R2N_CHAIN), channels_last,
      arithmetic, instruction_set);
}

// [weights (columns, depth, 1, 1) in panels, biases], both fp32.
std::vector<Tensor> pack_pointwise(const Tensor& weight, const Tensor& bias, int64_t instruction_set) {
  STD_TORCH_CHECK(
      weight.is_cpu() && weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1 && weight.numel() > 0,
      "weight must be (columns, depth, 1, 1) on the CPU");
  const int64_t columns = weight.size(0), depth = weight.size(1);
  STD_TORCH_CHECK(bias.is_cpu() && bias.numel() == columns, "bias must hold ", columns, " elements");
  const Kernels& kernels = kernels_of(instruction_set);
  const Tensor plain = torch::stable::contiguous(torch::stable::to(weight, ScalarType::Float));
  Tensor packed = new_floats(1, pointwise_floats(columns, depth));
  const float* const from = static_cast<const float*>(plain.const_data_ptr());
  float* const to = static_cast<float*>(packed.mutable_data_ptr());
  ask_for_huge_pages(to, packed.numel() * static_cast<int64_t>(sizeof(float)));
  torch::stable::parallel_for(0, panel_count(columns), 1, [&](int64_t first, int64_t last) {
    kernels.pack_pointwise(from, columns, depth, to, first, last);
  });
  return {packed, pack_biases({bias}, 1, columns)};
}

// (bytes,) for weights that are read from end to end.
Tensor new_memory(int64_t bytes) {
  Tensor memory = torch::stable::empty({&bytes, 1}, ScalarType::Byte);
  ask_for_huge_pages(memory.mutable_data_ptr(), bytes);
  return memory;
}

}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def(
      "cpu_block_forward(Tensor x, Tensor? shortcut, Tensor[] packed, int outplanes, int projection_stride, "
      "bool relu, " RES2NET_SCHEMA(R2N_CHAIN) ", bool channels_last, int arithmetic, int instruction_set) -> Tensor");
  m.def("cpu_pack_pointwise(Tensor weight, Tensor bias, int instruction_set) -> Tensor[]");
  m.def("cpu_new_memory(int bytes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CPU, m) {
  m.impl("cpu_block_forward", TORCH_BOX(&res2net_fused::block_forward_of_tensors));
  m.impl("cpu_pack_pointwise", TORCH_BOX(&res2net_fused::pack_pointwise));
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_new_memory", TORCH_BOX(&res2net_fused::new_memory));
}
