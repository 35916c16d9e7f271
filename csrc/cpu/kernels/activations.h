// Activations behind a convolution, forward and backward; NaN stays NaN, and infinities give what ATen's activations do.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {

// y = activation(y) of those that clamp. All others it leaves to `activated`.
struct Epilogue {
  float low, high;
  bool clamps_above;

  static R2N_INLINE_MEMBER Epilogue of(Activation activation) {
    const float infinity = __builtin_inff();
    const bool at_20 = activation.kind == Activation::hardtanh20, at_6 = activation.kind == Activation::relu6;
    const bool below = activation.clamps() && activation.kind != Activation::none;
    return {below ? 0.0f : -infinity, at_20 ? 20.0f : at_6 ? 6.0f : infinity, at_20 || at_6};
  }

  template <class V>
  R2N_INLINE_MEMBER V operator()(V y) const {
    y = clamp_below(y, broadcast<V>(low));
    return clamps_above ? clamp_above(y, broadcast<V>(high)) : y;
  }
};

// The polynomial of x with these factors, that of the highest power first.
template <class V, int N>
R2N_INLINE V polynomial(V x, const float (&factors)[N]) {
  V sum = broadcast<V>(factors[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; i++) sum = multiply_add(sum, x, broadcast<V>(factors[i]));
  return sum;
}

// e^x to two units in the last place; 0 and infinity where floats end.
template <class V>
R2N_INLINE V exponential(V x) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(V))));
  x = clamp_above(clamp_below(x, broadcast<V>(-110.0f)), broadcast<V>(90.0f));
  // 2^n * e^r: the sum with 1.5 * 2^23 is rounded to an integer, which its last bits hold.
  const V magic = broadcast<V>(12582912.0f), shifted = multiply_add(x, broadcast<V>(1.44269504f), magic), n = shifted - magic;
  V r = multiply_add(n, broadcast<V>(-0.693359375f), x);
  r = multiply_add(n, broadcast<V>(2.12194440e-4f), r);
  const V sum = polynomial(r, {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f});
  // In two factors: n is as low as -159, below the exponents of floats.
  const Bits power = (Bits)shifted - (Bits)magic + 256, half = power >> 1;
  return sum * (V)((half - 1) << 23) * (V)((power - half - 1) << 23);
}

template <class V>
R2N_INLINE V sigmoid(V x) {
  return broadcast<V>(1.0f) / (broadcast<V>(1.0f) + exponential(-x));
}

// The normal distribution's integral from minus infinity to x. Of |x| the other tail is e^(-x^2 / 2) times a polynomial in
// 1 / (1 + 0.22 |x|), fitted to a relative error of 3.4e-8.
template <class V>
R2N_INLINE V normal_integral(V x) {
  const V one = broadcast<V>(1.0f), far = x < V{} ? -x : x;
  const V t = one / multiply_add(far, broadcast<V>(0.22f), one);
  const V sum = polynomial(
      t, {-0.106571972f, 0.476327211f, -0.615798354f, 0.628741026f, -0.219941825f, 0.177067518f, 0.0711352602f, 0.0890411809f});
  const V tail = sum * t * exponential(far * far * broadcast<V>(-0.5f));
  return x < V{} ? tail : one - tail;
}

template <class V>
R2N_INLINE V leaky(V z, float slope) {
  return z > V{} ? z : z * broadcast<V>(slope);
}

// activation(z) of those that do not clamp.
template <class V>
R2N_INLINE V activated(V z, Activation activation) {
  switch (activation.kind) {
    case Activation::leaky_relu:
      return leaky(z, activation.slope);
    case Activation::hardswish:
      return z * (clamp_above(clamp_below(z + broadcast<V>(3.0f), V{}), broadcast<V>(6.0f)) / broadcast<V>(6.0f));
    case Activation::silu:
      return z * sigmoid(z);
    case Activation::gelu:
      return z * normal_integral(z);
    case Activation::gelu_tanh: {  // (1 + tanh(v)) / 2 = sigmoid(2 v)
      const V inner = multiply_add(z * z * z, broadcast<V>(0.044715f), z);
      return z * sigmoid(inner * broadcast<V>(1.59576912f));
    }
    case Activation::mish: {  // with n = e^z, tanh(log(1 + n)) = n (n + 2) / (n (n + 2) + 2); 1 from 20 on
      const V n = exponential(clamp_above(z, broadcast<V>(20.0f))), two = broadcast<V>(2.0f), p = n * (n + two);
      return z * (p / (p + two));
    }
    default:
      return z;
  }
}

// g times the derivative of an activation whose output shows it. NaN in y lets g pass ReLU, as in ATen's threshold_backward
// (ATen's hardtanh_backward does either, vector by vector), and takes the slope of leaky_relu, as there.
template <class V>
R2N_INLINE V masked(V g, V y, Activation activation) {
  const V zero{};
  if (activation.kind == Activation::relu) return y <= zero ? zero : g;
  if (activation.kind == Activation::none) return g;
  if (activation.kind == Activation::leaky_relu) return y > zero ? g : g * broadcast<V>(activation.slope);
  g = y <= zero ? zero : g;
  return y >= broadcast<V>(activation.kind == Activation::relu6 ? 6.0f : 20.0f) ? zero : g;
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
