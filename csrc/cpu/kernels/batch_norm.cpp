// BatchNorm in training mode between the convolutions, fused with what stands beside it: each pass goes over memory once.
#include "activations.h"
#include "kernels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

// dy of one vector where the activation passed its input on; du goes to its own place on the way.
template <bool Part>
R2N_INLINE Full masked_gradient(const NormBackward& n, int64_t p, int64_t c, int64_t lanes) {
  Full g = load_some<Part, Full>(n.grad + p * n.grad_pitch + c, lanes);
  if (n.du != nullptr) {
    const Full du = load_some<Part, Full>(n.du + p * n.channels + c, lanes);
    g += du;
    if (n.du_out != nullptr) store_some<Part>(n.du_out + p * n.du_out_pitch + c, du, lanes);
  }
  return masked(g, load_some<Part, Full>(n.out + p * n.out_pitch + c, lanes), n.activation);
}

}  // namespace

// Mean and sum of squared deviations of pixels first ... last, in two passes over what stays in cache: no digits cancel.
void norm_moments(const float* z, int64_t channels, int64_t first, int64_t last, float* mean, float* squares) {
  const float count = static_cast<float>(last - first);
  for_channels(channels, [&]<bool Part>(int64_t c, int64_t lanes) R2N_LAMBDA_INLINE {
    Full sum{}, squared{};
    for (int64_t p = first; p < last; p++) sum += load_some<Part, Full>(z + p * channels + c, lanes);
    const Full middle = sum / broadcast<Full>(count);
    for (int64_t p = first; p < last; p++) {
      const Full deviation = load_some<Part, Full>(z + p * channels + c, lanes) - middle;
      squared = multiply_add(deviation, deviation, squared);
    }
    store_some<Part>(mean + c, middle, lanes);
    store_some<Part>(squares + c, squared, lanes);
  });
}

namespace {

template <bool Clamps>
void activated_norm(const NormForward& n, int64_t first, int64_t last) {
  const int64_t w = n.channels;
  const Epilogue activate = Epilogue::of(n.activation);
  for (int64_t p = first; p < last; p++) {
    for_channels(w, [&]<bool Part>(int64_t c, int64_t lanes) R2N_LAMBDA_INLINE {
      const Full z = load_some<Part, Full>(n.z + p * w + c, lanes);
      const Full scale = load_some<Part, Full>(n.scale + c, lanes), shift = load_some<Part, Full>(n.shift + c, lanes);
      const Full centred = z - load_some<Part, Full>(n.mean + c, lanes);
      const Full v = multiply_add(centred, scale, shift);
      const Full y = Clamps ? activate(v) : leaky(v, n.activation.slope);
      store_some<Part>(n.out + p * n.out_pitch + c, y, lanes);
      if (n.next == nullptr) return;
      store_some<Part>(n.next + p * w + c, y + load_some<Part, Full>(n.addend + p * n.addend_pitch + c, lanes), lanes);
    });
  }
}

}  // namespace

void norm_forward(const NormForward& n, int64_t first, int64_t last) {
  n.activation.clamps() ? activated_norm<true>(n, first, last) : activated_norm<false>(n, first, last);
}

void activation_backward(const NormBackward& n, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; p++) {
    for_channels(n.channels, [&]<bool Part>(int64_t c, int64_t lanes) R2N_LAMBDA_INLINE {
      store_some<Part>(n.dz + p * n.dz_pitch + c, masked_gradient<Part>(n, p, c, lanes), lanes);
    });
  }
}

void norm_backward_sums(const NormBackward& n, int64_t first, int64_t last, float* sums, float* products) {
  const int64_t w = n.channels;
  for_channels(w, [&]<bool Part>(int64_t c, int64_t lanes) R2N_LAMBDA_INLINE {
    const Full mean = load_some<Part, Full>(n.mean + c, lanes);
    Full sum{}, product{};
    for (int64_t p = first; p < last; p++) {
      const Full g = masked_gradient<Part>(n, p, c, lanes);
      store_some<Part>(n.dz + p * w + c, g, lanes);
      sum += g;
      product = multiply_add(g, load_some<Part, Full>(n.z + p * w + c, lanes) - mean, product);
    }
    store_some<Part>(sums + c, sum, lanes);
    store_some<Part>(products + c, product, lanes);
  });
}

// dz = scale * (g - offset - (z - mean) * slope), in place of g.
void norm_backward_apply(const NormBackward& n, int64_t first, int64_t last) {
  const int64_t w = n.channels;
  for (int64_t p = first; p < last; p++) {
    for_channels(w, [&]<bool Part>(int64_t c, int64_t lanes) R2N_LAMBDA_INLINE {
      const Full centred = load_some<Part, Full>(n.z + p * w + c, lanes) - load_some<Part, Full>(n.mean + c, lanes);
      const Full g = load_some<Part, Full>(n.dz + p * w + c, lanes) - load_some<Part, Full>(n.offset + c, lanes);
      const Full inner = g - centred * load_some<Part, Full>(n.slope + c, lanes);
      store_some<Part>(n.dz + p * w + c, inner * load_some<Part, Full>(n.scale + c, lanes), lanes);
    });
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
