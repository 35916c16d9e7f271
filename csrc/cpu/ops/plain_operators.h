// The operators by PyTorch's own, where no kernel of this library can run and there is no Python: the twin of
// res2net_fused/chain/reference.py.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "operators/decisions.h"

namespace res2net_fused {

// Settings of a chain by their names, as the operators take them.
struct ChainNames {
  int64_t stride, dilation, groups;
  bool hierarchical;
  const std::string& passthrough;
  const std::optional<std::string>& pool;
  const std::string& activation;
};

Tensor plain_chain(
    const Tensor& x, const std::vector<Tensor>& weights, const std::optional<std::vector<Tensor>>& biases,
    const ChainNames& names);

// A convolution without padding.
Tensor plain_pointwise(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride);

Tensor plain_sum(const Tensor& a, const Tensor& b);

Tensor plain_relu(const Tensor& x);

}  // namespace res2net_fused
