// The host build of one instance, RES2NET_FUSED_INSTANCE: the kernel's own source, run by the emulator, with a C interface for
// ctypes.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda/chain/instance.cuh"
#include "cuda/plan/launch_plan.h"

using namespace res2net_fused::cuda;

namespace {
// Sizes of one call, as tests/support/emulator/harness.py fills them.
struct Call {
  const void* x;
  const void* weight;
  const float* bias;
  void* out;
  int images, height, width, channels, steps, stride, dilation, adds;
  int x_pixel, x_slot, out_pixel, out_slot, fill_channels, first_group, passed_group, pool, add_passed, weights_stand;
  float lower, upper;
  int instance, type;
  int rows, columns, tile_images, whole, warps_m, warps_n, slices, stages;
  int row_parts, channel_parts, warps_k;
  uint64_t seed;
  int checks;
};

constexpr int INDEX = int(InstanceIndex::RES2NET_FUSED_INSTANCE);  // the only instance of this build

template <class Element>
void run(const ChainArguments& arguments) {
  CtaOf<INDEX, Element>(arguments, block_index()).run();
}

using Kernel = void (*)(const ChainArguments&);
Kernel kernel_of(DataType type) {
  if (type == FP16) return run<fp16>;
  if (type == BF16) return run<bf16>;
  if constexpr (INSTANCE_TABLE[INDEX].runs(TF32)) return run<tf32>;
  return nullptr;
}
}  // namespace

extern "C" {
// Writes "kind|count|first finding" per line, and {bank ways, multiplies, switches, ctas, shared bytes}; -1: instance not
// built, -2: parts that do not fit together, or offsets that no int holds.
int run_call(const Call* call, char* text, int size, int64_t* statistics) {
  const Instance& instance = INSTANCE_TABLE[call->instance];
  const DataType type = DataType(call->type);
  const Kernel kernel = kernel_of(type);
  if (call->instance != INDEX || !kernel) return -1;
  const ChainProblem problem{call->images,   call->height,    call->width, call->channels, call->steps, call->stride,
                             call->dilation, call->adds != 0, type};
  const ChainTile tile{call->rows,   call->columns, call->tile_images, call->whole != 0,    call->warps_m, call->warps_n,
                       call->slices, call->stages,  call->row_parts,   call->channel_parts, call->warps_k};
  if (instance.cluster && !parts_fit(problem, tile, instance.columns)) return -2;
  ChainArguments a{};
  a.x = call->x, a.weight = call->weight, a.bias = call->bias, a.out = call->out;
  a.x_slots = {call->x_pixel, call->x_slot}, a.out_slots = {call->out_pixel, call->out_slot};
  a.fill_channels = call->fill_channels;
  a.first_group = call->first_group, a.passed_group = call->passed_group, a.pool = call->pool,
  a.add_passed = call->add_passed != 0, a.weights_stand = call->weights_stand != 0;
  a.lower = call->lower, a.upper = call->upper;
  a.geometry = geometry_of(problem, tile, call->instance);
  if (!offsets_fit(a, type) || !grid_fits(a.geometry)) return -2;
  set_moves(a, type);
  const ChainGeometry& g = a.geometry;
  const size_t pixels = size_t(problem.images) * problem.height * problem.width;
  const size_t out_pixels = size_t(problem.images) * problem.out_height() * problem.out_width();
  // Up to the last group's end: what lies behind it may be another tensor's.
  const int groups = std::max(a.first_group + g.steps, a.passed_group + 1);
  const auto bytes_in = [&](size_t count, const Slots& slots) {
    return ((count - 1) * slots.pixel + std::min(slots.pixel, groups * slots.slot)) * bytes_of(type);
  };
  const emulator::Launch launch{
      g.ctas(),
      g.threads(),
      g.shared_bytes,
      call->seed,
      call->checks != 0,
      {{"x", a.x, bytes_in(pixels, a.x_slots), false, true},
       {"weight", a.weight, size_t(g.steps) * problem.slices() * g.packed_columns * 256, false, !a.weights_stand},
       {"bias", a.bias, size_t(g.steps) * g.packed_columns * 8 * sizeof(float), false, !a.weights_stand},
       {"out", a.out, bytes_in(out_pixels, a.out_slots), true, true}},
      exchanges(problem, tile) ? tile.row_parts * tile.channel_parts : 1,
      true};
  const emulator::Report report = emulator::run(launch, [&] { kernel(a); });
  int used = 0;
  text[0] = 0;
  for (int kind = 0; kind < emulator::KINDS; kind++)
    if (report.count[kind] && used < size)
      used += std::snprintf(
          text + used, size - used, "%s|%lld|%s\n", emulator::KIND_NAMES[kind], (long long)report.count[kind],
          report.first[kind].c_str());
  const int64_t values[] = {report.bank_ways, report.multiplies, report.switches, g.ctas(), g.shared_bytes};
  std::memcpy(statistics, values, sizeof values);
  return 0;
}
}
