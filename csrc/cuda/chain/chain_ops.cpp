// torch.ops.res2net_fused_native.cuda_chain: launches the chain kernel on the current stream. No synchronisation and no
// allocation, so that it can be captured into a CUDA graph.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <iterator>
#include <limits>

#include "cuda/chain/launchers.h"
#include "cuda/chain/native_calls.h"
#include "cuda/device.h"
#include "cuda/plan/launch_plan.h"

namespace {

using namespace res2net_fused::cuda;
using torch::stable::Tensor;

#define RES2NET_LAUNCHER_ROW(name, ...) RES2NET_LAUNCHER(name),
// clang-format off
int (*const LAUNCHERS[])(const ChainArguments*, int, bool, void*) = {
    RES2NET_STRIP_INSTANCES(RES2NET_LAUNCHER_ROW)
    RES2NET_CLUSTER_INSTANCES(RES2NET_LAUNCHER_ROW)
#ifdef RES2NET_FUSED_HAVE_WGMMA
    RES2NET_WGMMA_INSTANCES(RES2NET_LAUNCHER_ROW)
#endif
};
// clang-format on
#undef RES2NET_LAUNCHER_ROW

DataType type_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(
      dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
      "x: expected float16, bfloat16 or float32");
  return dtype == ScalarType::Half ? FP16 : dtype == ScalarType::BFloat16 ? BF16 : TF32;
}

int narrow(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= -1 && value <= std::numeric_limits<int>::max(), name, ": ", value, " is out of range");
  return int(value);
}

#define RES2NET_NARROW(name) narrow(#name, name)  // named in the error

}  // namespace

// float32 is multiplied in TF32.
void res2net_fused::cuda::cuda_chain(
    Tensor x, Tensor weight, Tensor bias, Tensor out, RES2NET_PARAMETERS(RES2NET_LAUNCH_ARGUMENTS), double lower,
    double upper) {
  STD_TORCH_CHECK(
      x.is_cuda() && out.is_cuda() && weight.is_cuda() && bias.is_cuda(), "x, weight, bias, out: expected CUDA tensors");
  const int32_t device = x.get_device_index();
  const auto check_device = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(
        t.get_device_index() == device, name, ": on cuda:", t.get_device_index(), "; expected cuda:", device, ", where x is");
  };
  check_device("weight", weight), check_device("bias", bias), check_device("out", out);
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4, "x, out: expected four dimensions");
  const auto dtype = x.scalar_type();
  const DataType type = type_of(dtype);
  const int bytes = bytes_of(type), pair = 4 / bytes;  // pair: elements in 4 bytes, the smallest move
  STD_TORCH_CHECK(weight.scalar_type() == dtype && out.scalar_type() == dtype, "weight, out: expected the dtype of x");
  STD_TORCH_CHECK(bias.scalar_type() == torch::headeronly::ScalarType::Float, "bias: expected float32");

  const ChainProblem problem{
      .images = narrow("the batch of x", x.size(0)),
      .height = narrow("the height of x", x.size(2)),
      .width = narrow("the width of x", x.size(3)),
      .channels = RES2NET_NARROW(channels),
      .steps = RES2NET_NARROW(steps),
      .stride = RES2NET_NARROW(stride),
      .dilation = RES2NET_NARROW(dilation),
      .adds = adds,
      .type = type};
  const int index = RES2NET_NARROW(instance);
  STD_TORCH_CHECK(
      problem.channels >= 1 && problem.channels % pair == 0 && runs_on(problem, index), "instance: ", index,
      " does not run groups of ", problem.channels, " channels");
  const ChainTile tile{
      .rows = RES2NET_NARROW(rows),
      .columns = RES2NET_NARROW(columns),
      .images = RES2NET_NARROW(images),
      .whole = whole != 0,
      .warps_m = RES2NET_NARROW(warps_m),
      .warps_n = RES2NET_NARROW(warps_n),
      .slices = RES2NET_NARROW(slices),
      .stages = RES2NET_NARROW(stages),
      .row_parts = RES2NET_NARROW(row_parts),
      .channel_parts = RES2NET_NARROW(channel_parts),
      .warps_k = RES2NET_NARROW(warps_k)};
  STD_TORCH_CHECK(tile.stages >= 2 && tile.stages <= MAX_STAGES, "stages: ", tile.stages, "; expected 2 to ", MAX_STAGES);
  const Instance& row = INSTANCE_TABLE[index];
  STD_TORCH_CHECK(
      row.cluster ? parts_fit(problem, tile, row.columns) : tile.row_parts * tile.channel_parts * tile.warps_k == 1,
      "row_parts, channel_parts: ", tile.row_parts, " x ", tile.channel_parts, " parts do not make up the images and channels");
  STD_TORCH_CHECK(tile.warps_m % row.warps_together() == 0, "warps_m: ", tile.warps_m, " warps are no whole warpgroups");

  ChainArguments a{};
  a.geometry = geometry_of(problem, tile, index);
  STD_TORCH_CHECK(
      weight.numel() == int64_t(problem.steps) * problem.slices() * a.geometry.packed_columns * (256 / bytes),
      "weight: ", weight.numel(), " elements are not the packed weights of this plan");
  STD_TORCH_CHECK(
      bias.numel() == int64_t(problem.steps) * a.geometry.packed_columns * 8, "bias: not the packed biases of this plan");
  STD_TORCH_CHECK(
      out.size(0) == problem.images && out.size(2) == problem.out_height() && out.size(3) == problem.out_width(),
      "out: its size does not fit x");
  a.x = x.data_ptr(), a.weight = weight.data_ptr(), a.out = out.data_ptr();
  a.bias = static_cast<const float*>(bias.data_ptr());
  a.first_group = RES2NET_NARROW(first_group), a.passed_group = RES2NET_NARROW(passed_group), a.pool = RES2NET_NARROW(pool);
  a.x_slots = {.pixel = RES2NET_NARROW(x_pixel), .slot = RES2NET_NARROW(x_slot)};
  a.out_slots = {.pixel = RES2NET_NARROW(out_pixel), .slot = RES2NET_NARROW(out_slot)};
  STD_TORCH_CHECK(
      a.x_slots.pixel >= 1 && a.out_slots.pixel >= 1 && offsets_fit(a, type) && grid_fits(a.geometry), "x, out: an image of ",
      problem.height, " x ", problem.width, " pixels at a pitch of ", a.x_slots.pixel, " and ", a.out_slots.pixel,
      " elements, or the batch of ", problem.images, ", is larger than the kernel counts");
  a.fill_channels = RES2NET_NARROW(fill_channels);
  STD_TORCH_CHECK(
      a.fill_channels >= problem.channels && a.fill_channels % pair == 0 && a.fill_channels <= a.out_slots.slot &&
          a.fill_channels <= a.geometry.packed_columns * 8 &&
          a.fill_channels <= a.geometry.part_columns * a.geometry.channel_parts * 8,
      "fill_channels: ", a.fill_channels, " channels of a slot cannot be written");
  a.add_passed = add_passed;
  a.weights_stand = weights_stand;
  STD_TORCH_CHECK(!a.add_passed || a.passed_group >= 0, "add_passed: no group passes that could be added");
  a.lower = float(lower), a.upper = float(upper);
  STD_TORCH_CHECK(
      (reinterpret_cast<uint64_t>(a.x) | reinterpret_cast<uint64_t>(a.out)) % 4 == 0 &&
          (x_pixel | x_slot | out_pixel | out_slot) % pair == 0,
      "x, out: expected pixels and slots that are aligned to 4 bytes");
  // Weights are copied by 16 bytes, biases loaded two at a time.
  STD_TORCH_CHECK(reinterpret_cast<uint64_t>(a.weight) % 16 == 0, "weight: expected memory that is aligned to 16 bytes");
  STD_TORCH_CHECK(reinterpret_cast<uint64_t>(a.bias) % 8 == 0, "bias: expected memory that is aligned to 8 bytes");
  set_moves(a, type);

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "no current CUDA stream");
  STD_TORCH_CHECK(size_t(index) < std::size(LAUNCHERS), "instance: ", index, " is not in this build");
  const int error = LAUNCHERS[index](&a, type, overlaps, stream);
  STD_TORCH_CHECK(error == 0, "the chain kernel could not be launched: ", res2net_fused_cuda_error(error));
}

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def(
      "cuda_chain(Tensor x, Tensor weight, Tensor bias, Tensor(a!) out, "  //
      RES2NET_SCHEMA(RES2NET_LAUNCH_ARGUMENTS) ", float lower, float upper) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CUDA, m) { m.impl("cuda_chain", TORCH_BOX(&cuda_chain)); }
