// What threads of the chain kernels move and add: 4 bytes at the least, two elements in half precision and one float32 otherwise.
#pragma once
#include "cuda/chain/hardware.h"
#include "cuda/plan/geometry.h"

namespace res2net_fused::cuda {

template <int BYTES>
struct VectorOf;
template <>
struct VectorOf<4> {
  using type = Bytes4;
};
template <>
struct VectorOf<8> {
  using type = Bytes8;
};
template <>
struct VectorOf<16> {
  using type = Bytes16;
};

template <class Element>
struct Words {
  static constexpr int BYTES = Element::BYTES;
  static constexpr int PER_WORD = 4 / BYTES;        // elements in 4 bytes, the smallest move
  using Pair = typename VectorOf<2 * BYTES>::type;  // of neighbouring channels

  static DEVICE Float2 unpack_word(uint32_t word) {
    if constexpr (BYTES == 2)
      return unpack_pair<Element>(word);
    else
      return {float_of(word), 0};
  }
  static DEVICE uint32_t pack_word(float first, float second) {
    if constexpr (BYTES == 2)
      return pack_pair<Element>(first, second);
    else
      return bits_of(first);
  }
  static DEVICE uint32_t add_word(uint32_t left, uint32_t right) {
    if constexpr (BYTES == 2)
      return add_pair<Element>(left, right);
    else
      return bits_of(float_of(left) + float_of(right));
  }
  // TF32 factors are rounded here, where x and u both pass: the tensor cores would truncate them, which shrinks every one.
  // Eight instructions beside COLUMNS products of eight or more cycles each.
  static DEVICE FragmentA rounded(FragmentA matrix) {
    if constexpr (Element::TYPE == TF32)
      for (uint32_t& word : matrix.word) word = round_to_tf32(word);
    return matrix;
  }

  // What is computed once and kept in a register, where there is one: of 128 with pairs of float32 there is none on sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr bool HOLDS = BYTES == 2;
#else
  static constexpr bool HOLDS = true;
#endif
  template <class T>
  static DEVICE T held(T value) {
    if constexpr (HOLDS)
      return kept(value);
    else
      return value;
  }
  static DEVICE FastDivisor held(FastDivisor by) {
    by.divisor = held(int(by.divisor)), by.magic = held(int(by.magic));
    return by;
  }
};

}  // namespace res2net_fused::cuda
