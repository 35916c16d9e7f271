// A chain's settings by the names that the operators take; the codes are those that Python passes to res2net_fused_native.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "common/named_arguments.h"
#include "cpu/chain/problem.h"
#include "operators/decisions.h"

namespace res2net_fused {

struct ChainNames {
  int64_t stride, dilation, groups;
  bool hierarchical;
  const std::string& passthrough;
  const std::optional<std::string>& pool;
  const std::string& activation;
};

// What describes a chain without its images, as chain_arguments in res2net_fused/backends/cpu/settings.py passes it. channels:
// of a group. Enumerations come as their codes. slope: of the activation, where it has one.
#define R2N_CHAIN(INT, BOOL, FLOAT)                                                                                    \
  INT(channels), INT(steps), INT(stride), INT(dilation), INT(groups), BOOL(hierarchical), INT(passthrough), INT(pool), \
      INT(activation), FLOAT(slope)

inline Activation activation_of(int64_t code, double slope) {
  STD_TORCH_CHECK(code >= 0 && code <= Activation::mish, "activation must be 0 to ", Activation::mish, ", not ", code);
  return {static_cast<Activation::Kind>(code), static_cast<float>(slope)};
}

inline ChainProblem problem_of(int64_t batch, int64_t height, int64_t width, RES2NET_PARAMETERS(R2N_CHAIN)) {
  STD_TORCH_CHECK(
      channels >= 1 && steps >= 1 && stride >= 1 && dilation >= 1 && groups >= 1 && channels % groups == 0 && height >= 1 &&
          width >= 1,
      "no chain over images of ", height, " x ", width, " pixels: channels ", channels, ", steps ", steps, ", stride ", stride,
      ", dilation ", dilation, ", groups ", groups);
  return {
      .batch = batch,
      .height = height,
      .width = width,
      .channels = channels,
      .steps = steps,
      .stride = stride,
      .dilation = dilation,
      .groups = groups,
      .hierarchical = hierarchical,
      .passthrough = static_cast<Passthrough>(passthrough),
      .pool = static_cast<Pool>(pool),
      .activation = activation_of(activation, slope)};
}

template <size_t n>
int64_t code_of(const char* argument, const std::string& name, const char* const (&names)[n]) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), argument, " is '", name, "', which is none that there is");
  return found - std::begin(names);
}

// The code and the slope.
inline std::pair<int64_t, double> activation_named(const std::string& name) {
  constexpr const char* kNames[] = {"relu",      "none", "hardtanh20", "relu6",     "leaky_relu",
                                    "hardswish", "silu", "gelu",       "gelu_tanh", "mish"};
  const size_t colon = name.find(':');
  const int64_t code = code_of("activation", colon == std::string::npos ? name : name.substr(0, colon), kNames);
  if (code != Activation::leaky_relu) return {code, 0};
  return {code, colon == std::string::npos ? 0.01 : std::strtod(name.c_str() + colon + 1, nullptr)};
}

// The chain on x (N, s*w, H, W) or, for a block, on what has x's size. No farther than the image reaches, as Python has it.
// channels: of a group.
inline ChainProblem problem_named(const Tensor& x, int64_t channels, int64_t steps, const ChainNames& names) {
  constexpr const char* kPassthroughs[] = {"last", "none", "first", "first_added"};
  constexpr const char* kPools[] = {"none", "avg3", "avg3_nopad", "max3"};
  STD_TORCH_CHECK(x.dim() == 4, "x must be four-dimensional, not of ", x.dim(), " dimensions");
  const int64_t passthrough = code_of("passthrough", names.passthrough, kPassthroughs);
  const int64_t pool = names.pool.has_value() ? code_of("pool", *names.pool, kPools) : 0;
  STD_TORCH_CHECK(
      (pool == 0) == !names.pool.has_value() && (pool == 0 || names.passthrough != "none") &&
          (names.hierarchical || names.passthrough != "first_added") &&
          (names.stride == 1 || pool != 0 || names.passthrough == "none"),
      "stride, hierarchical, passthrough and pool do not go together");
  const int64_t largest = std::max(x.size(2), x.size(3));
  const auto [activation, slope] = activation_named(names.activation);
  return problem_of(
      x.size(0), x.size(2), x.size(3), channels, steps, std::min(names.stride, largest), std::min(names.dilation, largest),
      names.groups, names.hierarchical, passthrough, pool, activation, slope);
}

inline ChainProblem problem_named(const Tensor& x, const std::vector<Tensor>& weights, const ChainNames& names) {
  STD_TORCH_CHECK(!weights.empty() && weights[0].dim() == 4, "weights must be tensors (w, w/groups, 3, 3), at least one");
  return problem_named(x, weights[0].size(0), static_cast<int64_t>(weights.size()), names);
}

}  // namespace res2net_fused
