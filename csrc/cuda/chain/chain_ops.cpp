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
#include <vector>

#include "cuda/chain/launchers.h"
#include "cuda/device.h"
#include "cuda/plan/launch_plan.h"

namespace {

using namespace res2net_fused::cuda;
using torch::stable::Tensor;

#define RES2NET_LAUNCHER_ROW(name, ...) RES2NET_LAUNCHER(name),
int (*const LAUNCHERS[])(const ChainArguments*, int, void*) = {
    RES2NET_STRIP_INSTANCES(RES2NET_LAUNCHER_ROW)
        RES2NET_CLUSTER_INSTANCES(RES2NET_LAUNCHER_ROW)
#ifdef RES2NET_FUSED_HAVE_WGMMA
            RES2NET_WGMMA_INSTANCES(RES2NET_LAUNCHER_ROW)
#endif
};
#undef RES2NET_LAUNCHER_ROW

DataType type_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
                  "x: expected float16, bfloat16 or float32");
  return dtype == ScalarType::Half ? FP16 : dtype == ScalarType::BFloat16 ? BF16 : TF32;
}

int narrow(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= -1 && value <= std::numeric_limits<int>::max(), name, ": ", value, " is out of range");
  return int(value);
}

// plan: the first twelve numbers of a plan (cuda/plan/launch_plan.h). settings: channels, steps, stride, dilation, adds, first
// group, passed group or -1, pool, then in elements the pixel and slot pitch of x and of out, the channels of a slot to be written,
// and whether the passed group is added to the first convolved one. float32 is multiplied in TF32.
void cuda_chain(Tensor x, Tensor weight, Tensor bias, Tensor out, std::vector<int64_t> plan, std::vector<int64_t> settings,
                double lower, double upper) {
  STD_TORCH_CHECK(plan.size() >= 12, "plan: expected at least 12 numbers, got ", plan.size());
  STD_TORCH_CHECK(settings.size() == 14, "settings: expected 14 numbers, got ", settings.size());
  STD_TORCH_CHECK(x.is_cuda() && out.is_cuda() && weight.is_cuda() && bias.is_cuda(), "x, weight, bias, out: expected CUDA tensors");
  const int32_t device = x.get_device_index();
  const auto check_device = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.get_device_index() == device, name, ": on cuda:", t.get_device_index(), "; expected cuda:", device,
                    ", where x is");
  };
  check_device("weight", weight), check_device("bias", bias), check_device("out", out);
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4, "x, out: expected four dimensions");
  const auto dtype = x.scalar_type();
  const DataType type = type_of(dtype);
  const int bytes = bytes_of(type), pair = 4 / bytes;  // pair: elements in 4 bytes, the smallest move
  STD_TORCH_CHECK(weight.scalar_type() == dtype && out.scalar_type() == dtype, "weight, out: expected the dtype of x");
  STD_TORCH_CHECK(bias.scalar_type() == torch::headeronly::ScalarType::Float, "bias: expected float32");

  ChainProblem problem;
  problem.images = narrow("images", x.size(0));
  problem.height = narrow("height", x.size(2)), problem.width = narrow("width", x.size(3));
  problem.channels = narrow("channels", settings[0]), problem.steps = narrow("steps", settings[1]);
  problem.stride = narrow("stride", settings[2]), problem.dilation = narrow("dilation", settings[3]);
  problem.adds = settings[4] != 0;
  problem.type = type;
  const int index = narrow("instance", plan[0]);
  STD_TORCH_CHECK(problem.channels >= 1 && problem.channels % pair == 0 && runs_on(problem, index),
                  "plan: instance ", index, " does not run groups of ", problem.channels, " channels");
  ChainTile tile;
  tile.rows = narrow("rows", plan[1]), tile.columns = narrow("columns", plan[2]), tile.images = narrow("images", plan[3]);
  tile.whole = plan[4] != 0;
  tile.warps_m = narrow("warps_m", plan[5]), tile.warps_n = narrow("warps_n", plan[6]);
  tile.slices = narrow("slices", plan[7]), tile.stages = narrow("stages", plan[8]);
  tile.row_parts = narrow("row parts", plan[9]), tile.channel_parts = narrow("channel parts", plan[10]);
  tile.warps_k = narrow("warps_k", plan[11]);
  const Instance& instance = INSTANCE_TABLE[index];
  STD_TORCH_CHECK(instance.cluster ? parts_fit(problem, tile, instance.columns)
                                   : tile.row_parts * tile.channel_parts * tile.warps_k == 1,
                  "plan: ", tile.row_parts, " x ", tile.channel_parts, " parts do not make up the images and channels");

  STD_TORCH_CHECK(tile.warps_m % instance.warps_together() == 0, "plan: ", tile.warps_m, " warps are no whole warpgroups");

  ChainArguments a{};
  a.geometry = geometry_of(problem, tile, index);
  STD_TORCH_CHECK(weight.numel() == int64_t(problem.steps) * problem.slices() * a.geometry.packed_columns * (256 / bytes),
                  "weight: ", weight.numel(), " elements are not the packed weights of this plan");
  STD_TORCH_CHECK(bias.numel() == int64_t(problem.steps) * a.geometry.packed_columns * 8,
                  "bias: not the packed biases of this plan");
  STD_TORCH_CHECK(out.size(0) == problem.images && out.size(2) == problem.out_height() && out.size(3) == problem.out_width(),
                  "out: its size does not fit x");
  a.x = x.data_ptr(), a.weight = weight.data_ptr(), a.out = out.data_ptr();
  a.bias = static_cast<const float*>(bias.data_ptr());
  a.first_group = narrow("first group", settings[5]), a.passed_group = narrow("passed group", settings[6]);
  a.pool = narrow("pool", settings[7]);
  a.x_slots = {narrow("x pixel pitch", settings[8]), narrow("x slot pitch", settings[9])};
  a.out_slots = {narrow("out pixel pitch", settings[10]), narrow("out slot pitch", settings[11])};
  STD_TORCH_CHECK(a.x_slots.pixel >= 1 && a.out_slots.pixel >= 1 && offsets_fit(a, type) && grid_fits(a.geometry),
                  "x, out: an image of ", problem.height, " x ", problem.width, " pixels at a pitch of ", a.x_slots.pixel,
                  " and ", a.out_slots.pixel, " elements, or the batch of ", problem.images, ", is larger than the kernel counts");
  a.fill_channels = narrow("filled channels", settings[12]);
  STD_TORCH_CHECK(a.fill_channels >= problem.channels && a.fill_channels % pair == 0 && a.fill_channels <= a.out_slots.slot &&
                      a.fill_channels <= a.geometry.packed_columns * 8 &&
                      a.fill_channels <= a.geometry.part_columns * a.geometry.channel_parts * 8,
                  "settings: ", a.fill_channels, " channels of a slot cannot be written");
  a.add_passed = settings[13] != 0;
  STD_TORCH_CHECK(!a.add_passed || a.passed_group >= 0, "settings: no group passes that could be added");
  a.lower = float(lower), a.upper = float(upper);
  STD_TORCH_CHECK((reinterpret_cast<uint64_t>(a.x) | reinterpret_cast<uint64_t>(a.out)) % 4 == 0 &&
                      (settings[8] | settings[9] | settings[10] | settings[11]) % pair == 0,
                  "x, out: expected pixels and slots that are aligned to 4 bytes");
  // Of copies of 16 bytes, and of loads of two numbers.
  STD_TORCH_CHECK(reinterpret_cast<uint64_t>(a.weight) % 16 == 0, "weight: expected memory that is aligned to 16 bytes");
  STD_TORCH_CHECK(reinterpret_cast<uint64_t>(a.bias) % 8 == 0, "bias: expected memory that is aligned to 8 bytes");
  set_moves(a, type);

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "no current CUDA stream");
  STD_TORCH_CHECK(size_t(index) < std::size(LAUNCHERS), "plan: instance ", index, " is not in this build");
  const int error = LAUNCHERS[index](&a, type, stream);
  STD_TORCH_CHECK(error == 0, "the chain kernel could not be launched: ", res2net_fused_cuda_error(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def(
      "cuda_chain(Tensor x, Tensor weight, Tensor bias, Tensor(a!) out, int[] plan, int[] settings, float lower, float upper) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CUDA, m) { m.impl("cuda_chain", TORCH_BOX(&cuda_chain)); }
