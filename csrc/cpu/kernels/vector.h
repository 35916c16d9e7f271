// Vectors of 4, 8 or 16 floats over the compiler's vector extension; intrinsics only where it has no word for something.
//
//              Full (one register)   Half (a group's last 8 channels)
//   portable   4 (SSE2)              -: two Full
//   neon       4                     -: two Full
//   avx2       8                     -: one Full
//   avx512     16                    8
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define R2N_INLINE static inline __attribute__((always_inline))
#define R2N_LAMBDA_INLINE __attribute__((always_inline))

namespace res2net_fused::RES2NET_FUSED_ISA {

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));

#if defined(__AVX512F__)
typedef Vec16 Full;
typedef Vec8 Half;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
typedef Vec8 Full;
typedef Vec8 Half;
constexpr int kRegisters = 16;
#else
typedef Vec4 Full;
typedef Vec4 Half;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(float);

// The same vector without the alignment of its type.
template <class V>
struct Unaligned;
template <>
struct Unaligned<Vec4> {
  typedef float type __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct Unaligned<Vec8> {
  typedef float type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Unaligned<Vec16> {
  typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
};

template <class V>
R2N_INLINE V load(const float* p) {
  return *reinterpret_cast<const typename Unaligned<V>::type*>(p);
}

template <class V>
R2N_INLINE void store(float* p, V v) {
  *reinterpret_cast<typename Unaligned<V>::type*>(p) = v;
}

template <class V>
R2N_INLINE V broadcast(float x) {
  if constexpr (kLanes<V> == 4) {
    return V{x, x, x, x};
  } else if constexpr (kLanes<V> == 8) {
    return V{x, x, x, x, x, x, x, x};
  } else {
    return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
  }
}

// a * b + c, in one instruction where there is one: the compiler contracts it.
template <class V>
R2N_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}

// Lanes of two vectors of four, counted through both.
#if defined(__clang__)
#define R2N_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Lanes4 __attribute__((vector_size(16)));
#define R2N_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes4{__VA_ARGS__})
#endif

// The first n lanes, 0 < n < lanes; the others are zero. Reads nothing behind them.
template <class V>
R2N_INLINE V load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (kLanes<V> == 16) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  if constexpr (kLanes<V> == 8) return _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << n) - 1), p);
#elif defined(__AVX2__)
  if constexpr (kLanes<V> == 8) {
    static const int32_t masks[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks + 8 - n)));
  }
#endif
  float lanes[kLanes<V>] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
  return load<V>(lanes);
}

// The last 8 channels of a group in a register like the others': AVX-512 multiplies narrower ones on one port instead of two.
#if defined(__AVX512F__)
R2N_INLINE Full load_half(const float* p) { return _mm512_maskz_loadu_ps(0xff, p); }
R2N_INLINE Half first_half(Full v) { return _mm512_castps512_ps256(v); }
#else
R2N_INLINE Half load_half(const float* p) { return load<Half>(p); }
R2N_INLINE Half first_half(Half v) { return v; }
#endif

// Writes the first n lanes, 0 < n < lanes, and nothing behind them.
template <class V>
R2N_INLINE void store_first(float* p, V v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (kLanes<V> == 16) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
  if constexpr (kLanes<V> == 8) return _mm256_mask_storeu_ps(p, static_cast<__mmask8>((1u << n) - 1), v);
#endif
  // Masked stores of AVX2 are slow on AMD's processors.
  float lanes[kLanes<V>];
  store(lanes, v);
  const float* from = lanes;
  if constexpr (kLanes<V> == 8) {
    if (n & 4) {
      memcpy(p, from, 16);
      p += 4;
      from += 4;
    }
  }
  if (n & 2) {
    memcpy(p, from, 8);
    p += 2;
    from += 2;
  }
  if (n & 1) *p = *from;
}

template <bool Part, class V>
R2N_INLINE V load_some(const float* p, int64_t n) {
  if constexpr (Part) return load_first<V>(p, n);
  return load<V>(p);
}

template <bool Part, class V>
R2N_INLINE void store_some(float* p, V v, int64_t n) {
  if constexpr (Part) return store_first(p, v, n);
  store(p, v);
}

// max(y, 0) and min(y, 20) that keep NaN.
template <class V>
R2N_INLINE V clamp_below(V y, V low) {
#if defined(__AVX512F__)
  // All lanes of the masked form: the plain one draws a false warning of GCC 12.
  if constexpr (kLanes<V> == 16) return _mm512_maskz_max_ps(0xffff, low, y);
#endif
#if defined(__AVX2__)
  if constexpr (kLanes<V> == 8) return _mm256_max_ps(low, y);  // of unordered operands the second
#endif
#if defined(__aarch64__)
  return vmaxq_f32(y, low);  // NaN of either
#endif
  return y < low ? low : y;
}

template <class V>
R2N_INLINE V clamp_above(V y, V high) {
#if defined(__AVX512F__)
  if constexpr (kLanes<V> == 16) return _mm512_maskz_min_ps(0xffff, high, y);
#endif
#if defined(__AVX2__)
  if constexpr (kLanes<V> == 8) return _mm256_min_ps(high, y);
#endif
#if defined(__aarch64__)
  return vminq_f32(y, high);
#endif
  return y > high ? high : y;
}

template <class V>
R2N_INLINE bool all_finite(V v) {
  const V zero = v * 0.0f;  // NaN where v is not finite
#if defined(__AVX512F__)
  if constexpr (kLanes<V> == 16) return _mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q) == 0;
#endif
#if defined(__AVX2__)
  if constexpr (kLanes<V> == 8) return _mm256_movemask_ps(_mm256_cmp_ps(zero, zero, _CMP_UNORD_Q)) == 0;
#endif
#if defined(__aarch64__)
  return vminvq_u32(vceqzq_f32(zero)) != 0;
#endif
  bool finite = true;
  for (int i = 0; i < kLanes<V>; i++) finite &= zero[i] == 0.0f;
  return finite;
}

R2N_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// All channels of one pixel: f<Part>(channel, lanes) for whole vectors, and then one call with Part for the rest.
template <class F>
R2N_INLINE void for_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<Full> <= channels; c += kLanes<Full>) f.template operator()<false>(c, kLanes<Full>);
  if (c < channels) f.template operator()<true>(c, channels - c);
}

// Calls f(V(), channel, lanes that belong to the group) for the vectors of channels first ... last, multiples of kUnit. A
// vector behind the group is left out.
template <class F>
R2N_INLINE void for_each_vector(int64_t first, int64_t last, int64_t channels, const F& f) {
  int64_t c = first;
  for (; c + kLanes<Full> <= last && c < channels; c += kLanes<Full>) f(Full(), c, channels - c);
  if constexpr (kLanes<Half> < kLanes<Full>) {
    if (c < last) f(Half(), c, channels - c);
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
