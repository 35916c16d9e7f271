// What the operators of the CPU library make of their arguments. These are checked by Python already; what is checked here
// keeps a wrong call from touching memory that is not its own.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/scratch.h"
#include "operators/chain_names.h"

namespace res2net_fused {

inline const Kernels& kernels_of(int64_t instruction_set) {
  const Kernels* kernels = find_kernels(static_cast<InstructionSet>(instruction_set));
  STD_TORCH_CHECK(kernels != nullptr, "instruction_set ", instruction_set, " is not available on this machine");
  return *kernels;
}

// For the kernels of a backward, which know an activation's derivative from its output.
inline Activation activation_read_off(int64_t code, double slope) {
  const Activation activation = activation_of(code, slope);
  STD_TORCH_CHECK(activation.shows_slope(), "activation ", code, " has no derivative that its output shows");
  return activation;
}

// Floats that cpu_pack or cpu_pack_pointwise made, wherever they lie.
struct Packed {
  const float* floats;
  int64_t count;
};

inline Packed packed_in(const Tensor& tensor) {
  if (tensor.numel() == 0) return {nullptr, 0};  // of any type
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(),
      "packed weights must be contiguous floats on the CPU");
  return {static_cast<const float*>(tensor.const_data_ptr()), tensor.numel()};
}

// Those of `name`, which must be as many as packing makes; null if there are none and may be none.
inline const float* packed_floats(const Packed& packed, const char* name, int64_t floats, bool may_be_empty = false) {
  if (may_be_empty && packed.count == 0) return nullptr;
  STD_TORCH_CHECK(
      packed.count == floats, name, " must be ", floats, " floats as packing returns them; it has ", packed.count, " elements");
  return packed.floats;
}

inline const float* packed_floats(const Tensor& tensor, const char* name, int64_t floats, bool may_be_empty = false) {
  return packed_floats(packed_in(tensor), name, floats, may_be_empty);
}

inline void check_weight(const Tensor& weight, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(
      weight.is_cpu() && weight.dim() == 4 && weight.size(0) == outputs && weight.size(1) == inputs && weight.size(2) == 3 &&
          weight.size(3) == 3,
      "every weight must be (", outputs, ", ", inputs, ", 3, 3)");
}

// A weight (w, w, 3, 3) in place, or its copy in fp32, which `kept` holds.
inline WeightView weight_view(const Tensor& weight, int64_t channels, std::vector<Tensor>& kept) {
  check_weight(weight, channels, channels);
  kept.push_back(torch::stable::to(weight, ScalarType::Float));
  const Tensor& t = kept.back();
  return {static_cast<const float*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// x with its channels side by side, in fp32.
inline Tensor as_nhwc_floats(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float) {
    return torch::stable::to(
        x, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt, false, false, MemoryFormat::ChannelsLast);
  }
  if (x.stride(1) == 1 || x.size(1) == 1) return x;
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

// Memory of many MB comes fresh from the system at each call, and is filled with zeros page by page as it is written: with small
// pages that takes as long as a 1x1 convolution.
inline Tensor empty_nhwc(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  constexpr int64_t kFresh = int64_t{8} << 20;
  const int64_t sizes[4] = {batch, channels, height, width};
  Tensor out = torch::stable::empty(
      {sizes, 4}, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt, MemoryFormat::ChannelsLast);
  const int64_t bytes = out.numel() * static_cast<int64_t>(sizeof(float));
  if (bytes >= kFresh) ask_for_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

inline Tensor new_floats(int64_t rows, int64_t floats) {
  const int64_t sizes[2] = {rows, floats};
  return torch::stable::empty({sizes, 2}, ScalarType::Float);
}

// (steps, bias_floats(channels)) in fp32, zero where there is no bias.
inline Tensor pack_biases(const std::vector<Tensor>& biases, int64_t steps, int64_t channels) {
  STD_TORCH_CHECK(
      biases.empty() || static_cast<int64_t>(biases.size()) == steps, "one bias for each of ", steps,
      " convolutions is needed");
  Tensor packed = new_floats(steps, bias_floats(channels));
  torch::stable::zero_(packed);
  for (size_t i = 0; i < biases.size(); i++) {
    STD_TORCH_CHECK(biases[i].is_cpu() && biases[i].numel() == channels, "every bias must hold ", channels, " elements");
    const Tensor plain = torch::stable::contiguous(torch::stable::to(biases[i], ScalarType::Float));
    const float* from = static_cast<const float*>(plain.const_data_ptr());
    if (from == nullptr) continue;  // a tensor of zeros without memory
    float* to = static_cast<float*>(packed.mutable_data_ptr()) + static_cast<int64_t>(i) * bias_floats(channels);
    for (int64_t c = 0; c < channels; c++) to[c] = from[c];
  }
  return packed;
}

// Channels-last fp32 in the type and the layout that the caller wants.
inline Tensor as_asked(const Tensor& out, ScalarType dtype, bool channels_last) {
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  if (dtype != ScalarType::Float) {
    return torch::stable::to(out, dtype, std::nullopt, std::nullopt, std::nullopt, false, false, format);
  }
  return channels_last ? out : torch::stable::contiguous(out, format);
}

}  // namespace res2net_fused
