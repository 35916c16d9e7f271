// The native bodies of the operators: who runs a call, once for all libraries. Checks and choice are Python's where it is there.
#pragma once

#include "operators/plain_operators.h"

namespace res2net_fused {

// Library: its backend's name `kOwn`; `rule(backend, x)`, which decides a call without Python, and `rule_1d`; `beside(x, y)`, what
// decisions depend on that Key does not see; and each operator by its own kernels, in the memory format that is asked for. packed:
// weights in the backend's own layout, or null. `gathered` may be missing.
template <class Library>
struct Bodies {
  static Tensor hierarchical_conv2d(
      const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const OptionalTensors& packed,
      const std::string& layout, int64_t stride, int64_t dilation, int64_t groups, bool hierarchical,
      const std::string& passthrough, const OptionalString& pool, const std::string& activation, const std::string& backend) {
    Decision decision;
    const Tensors outputs = decide(
        decision, "hierarchical_conv2d", Library::kOwn, [&] { return Library::rule(backend, x); }, Library::beside(x, {}), x,
        weights, biases, packed, layout, stride, dilation, groups, hierarchical, passthrough, pool, activation, backend);
    if (!outputs.empty()) return outputs[0];
    const ChainNames names{stride, dilation, groups, hierarchical, passthrough, pool, activation};
    if (!decision.own) return plain_hierarchical_conv2d(x, weights, biases, names);
    const bool last = suggests_channels_last(x);
    return unambiguous(Library::chain(decision, x, weights, biases, own_packed(packed, layout), names, last), last);
  }

  static Tensor bottle2neck(
      const Tensor& x, const std::optional<Tensor>& shortcut, const Tensor& conv1_weight, const Tensor& conv1_bias,
      const Tensors& weights, const Tensors& biases, const Tensor& conv3_weight, const Tensor& conv3_bias,
      const std::optional<Tensor>& projection_weight, const std::optional<Tensor>& projection_bias, int64_t projection_stride,
      const OptionalTensors& packed, const std::string& layout, bool relu, int64_t stride, int64_t dilation, int64_t groups,
      bool hierarchical, const std::string& passthrough, const OptionalString& pool, const std::string& activation,
      const std::string& backend) {
    Decision decision;
    const Tensors outputs = decide(
        decision, "bottle2neck", Library::kOwn, [&] { return Library::rule(backend, x); }, Library::beside(x, shortcut), x,
        shortcut, conv1_weight, conv1_bias, weights, biases, conv3_weight, conv3_bias, projection_weight, projection_bias,
        projection_stride, packed, layout, relu, stride, dilation, groups, hierarchical, passthrough, pool, activation,
        backend);
    if (!outputs.empty()) return outputs[0];
    const ChainNames names{stride, dilation, groups, hierarchical, passthrough, pool, activation};
    const BlockTensors block{x,          shortcut,          conv1_weight,    conv1_bias,       weights, biases, conv3_weight,
                             conv3_bias, projection_weight, projection_bias, projection_stride};
    if (!decision.own) return plain_bottle2neck(block, relu, names);
    const bool last = suggests_channels_last(x);
    return unambiguous(Library::block(decision, block, own_packed(packed, layout), relu, names, last), last);
  }

  // Of libraries whose weights can be gathered in one tensor; Python alone runs the call on another backend.
  static Tensor frozen_bottle2neck(
      const Tensor& x, const std::optional<Tensor>& shortcut, const Tensor& memory, const std::string& layout, bool relu,
      int64_t stride, int64_t dilation, int64_t groups, bool hierarchical, const std::string& passthrough,
      const OptionalString& pool, const std::string& activation, const std::string& backend) {
    Decision decision;
    const Tensors outputs = decide(
        decision, "frozen_bottle2neck", Library::kOwn, [&] { return Library::rule(backend, x); }, Library::beside(x, shortcut),
        x, shortcut, memory, layout, relu, stride, dilation, groups, hierarchical, passthrough, pool, activation, backend);
    if (!outputs.empty()) return outputs[0];
    STD_TORCH_CHECK(decision.own, "without Python, frozen_bottle2neck runs on ", Library::kOwn, " only");
    const ChainNames names{stride, dilation, groups, hierarchical, passthrough, pool, activation};
    const bool last = suggests_channels_last(x);
    return unambiguous(Library::gathered(decision, x, shortcut, memory, relu, names, last), last);
  }

  static Tensors hierarchical_conv1d(
      const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const OptionalTensors& scale,
      const OptionalTensors& shift, const OptionalTensors& packed, int64_t dilation, const std::string& passthrough,
      const std::string& padding_mode, bool keep, const std::string& backend, const std::string& activation) {
    Decision decision;
    Tensors outputs = decide(
        decision, "hierarchical_conv1d", Library::kOwn, [&] { return Library::rule_1d(backend, x); }, Library::beside(x, {}), x,
        weights, biases, scale, shift, packed, dilation, passthrough, padding_mode, keep, backend, activation);
    if (!outputs.empty()) return outputs;
    const RowsChain chain{x, weights, biases, scale, shift, dilation, passthrough, padding_mode, activation, keep};
    return decision.own ? Library::rows(decision, chain, packed) : plain_hierarchical_conv1d(chain);
  }

 private:
  static const Tensors* own_packed(const OptionalTensors& packed, const std::string& layout) {
    return layout == Library::kOwn && packed.has_value() && !packed->empty() ? &*packed : nullptr;
  }
};

}  // namespace res2net_fused

#define RES2NET_IMPLEMENT_BODIES(library, Library)                               \
  library.impl("hierarchical_conv2d", TORCH_BOX(&Library::hierarchical_conv2d)); \
  library.impl("bottle2neck", TORCH_BOX(&Library::bottle2neck));                 \
  library.impl("hierarchical_conv1d", TORCH_BOX(&Library::hierarchical_conv1d))
