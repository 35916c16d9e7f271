// What the operators res2net_fused_native::cpu_* do, for callers in C++.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "cpu/ops/op_arguments.h"
#include "operators/plain_operators.h"

namespace res2net_fused {

Tensor chain_forward(
    const Tensor& x_given, const Tensor& winograd, const Tensor& direct, const Tensor& bias, RES2NET_PARAMETERS(R2N_CHAIN),
    bool channels_last, int64_t arithmetic, int64_t instruction_set);

std::vector<Tensor> chain_from_weights(
    const Tensor& x_given, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, bool turned,
    RES2NET_PARAMETERS(R2N_CHAIN), bool channels_last, int64_t instruction_set);

std::vector<Tensor> pack(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, int64_t groups, bool with_winograd,
    int64_t instruction_set);

// A block's packed weights: conv1's weights and biases, conv3's weights, its biases (with the projection's), the projection's
// weights or none, then what `pack` returns.
constexpr size_t kPackedPieces = 8;
struct PackedBlock {
  std::array<Packed, kPackedPieces> pieces;
};

PackedBlock packed_block(const std::vector<Tensor>& packed);

// What lies in one tensor beside them. channels: of a group.
struct GatheredBlock {
  int64_t channels, steps, outplanes, projection_stride;
  PackedBlock weights;
};

GatheredBlock gathered_block(const Tensor& memory);

Tensor block_forward(
    const Tensor& x_given, const std::optional<Tensor>& shortcut_given, const PackedBlock& weights, int64_t outplanes,
    int64_t projection_stride, bool relu, RES2NET_PARAMETERS(R2N_CHAIN), bool channels_last, int64_t arithmetic,
    int64_t instruction_set);

std::vector<Tensor> pack_pointwise(const Tensor& weight, const Tensor& bias, int64_t instruction_set);

// Whether rows_forward has kernels for such rows; others are left to PyTorch's operators.
bool knows_rows_of(const Tensor& x);

// Whether products are predicted to be faster than convolutions for so many rows of all images together.
bool multiplies_rows(int64_t rows);

// The chain along rows. packed: of pack_1d in res2net_fused/backends/cpu/chain1d.py, or nothing. multiplies: by one product for
// each convolution, else by PyTorch's convolutions of rows that are padded where they are summed.
Tensors rows_forward(const RowsChain& chain, const OptionalTensors& packed, bool multiplies);

}  // namespace res2net_fused
