// Activations behind a convolution, forward and backward; NaN stays NaN.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {

// y = activation(y).
struct Epilogue {
  float low, high;
  bool clamps_above;

  static R2N_INLINE_MEMBER Epilogue of(Activation activation) {
    const float infinity = __builtin_inff();
    return {
        activation == Activation::none ? -infinity : 0.0f, activation == Activation::hardtanh20 ? 20.0f : infinity,
        activation == Activation::hardtanh20};
  }

  template <class V>
  R2N_INLINE_MEMBER V operator()(V y) const {
    y = clamp_below(y, broadcast<V>(low));
    return clamps_above ? clamp_above(y, broadcast<V>(high)) : y;
  }
};

// g where the activation passed its input on, which its output y shows, else 0; NaN in y passes, as in ATen's
// threshold_backward (ATen's hardtanh_backward does either, vector by vector).
template <class V>
R2N_INLINE V masked(V g, V y, Activation activation) {
  if (activation == Activation::none) return g;
  const V zero{};
  g = y <= zero ? zero : g;
  return activation == Activation::hardtanh20 ? (y >= broadcast<V>(20.0f) ? zero : g) : g;
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
