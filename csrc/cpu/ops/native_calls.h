// What the operators res2net_fused_native::cpu_* do, for callers in C++.
#pragma once

#include <optional>
#include <vector>

#include "cpu/ops/op_arguments.h"

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

Tensor block_forward(
    const Tensor& x_given, std::optional<Tensor> shortcut_given, const std::vector<Tensor>& packed, int64_t outplanes,
    int64_t projection_stride, bool relu, RES2NET_PARAMETERS(R2N_CHAIN), bool channels_last, int64_t arithmetic,
    int64_t instruction_set);

std::vector<Tensor> pack_pointwise(const Tensor& weight, const Tensor& bias, int64_t instruction_set);

}  // namespace res2net_fused
