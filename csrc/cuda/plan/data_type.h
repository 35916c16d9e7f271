// The types that the chain kernels compute in, and what follows from their size; stated once for the plan, the kernels and the
// emulator.
#pragma once
#include <cstdint>

namespace res2net_fused::cuda {

// TF32 is float32 in memory; only the factors of a product are rounded to TF32.
enum DataType : int { FP16 = 0, BF16 = 1, TF32 = 2 };
constexpr int DATA_TYPES = 3;

constexpr int bytes_of(DataType type) { return type == TF32 ? 4 : 2; }
// A "depth" is the K of one mma: 32 bytes of channels in every type, so memory is laid out and moved alike.
constexpr int DEPTH_BYTES = 32;
constexpr int depth_channels(DataType type) { return DEPTH_BYTES / bytes_of(type); }
constexpr int mma_flops(DataType type) { return 2 * 16 * 8 * depth_channels(type); }

}  // namespace res2net_fused::cuda
