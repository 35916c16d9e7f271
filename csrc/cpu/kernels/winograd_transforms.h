// F(4x4, 3x3), F(3x3, 3x3) and F(2x2, 3x3), also mixed in one tile, over one set of transformed weights.
//
// The points are 0, 1, -1, 2, -2 and infinity. F(3, 3) leaves out -2, F(2, 3) leaves out 2 as well; what their own weight
// transforms would scale differently is scaled in the input transform instead, so that one packed U serves all three:
//
//   point        0    1   -1    2   -2  inf        weight row of G
//   F(4, 3)      x    x    x    x    x    x          0: (1, 0, 0) / 4      2: (1, 2, 4) / 24
//   F(3, 3)      x    x    x    x    -    x          1: (1, 1, 1) / -6    -2: (1, -2, 4) / 24
//   F(2, 3)      x    x    x    -    -    x         -1: (1, -1, 1) / -6  inf: (0, 0, 1)
#pragma once

#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {

template <int Size>
constexpr bool uses_point(int i) {
  return Size == 4 || (Size == 3 && i != 4) || (Size == 2 && i != 3 && i != 4);
}

// B^T d: Size + 2 inputs to the points.
template <int Size, class V>
R2N_INLINE void input_points(const V* d, V* o) {
  const V two = broadcast<V>(2), three = broadcast<V>(3), four = broadcast<V>(4), five = broadcast<V>(5);
  if constexpr (Size == 4) {
    const V even = d[4] - four * d[2], odd = d[3] - four * d[1];
    const V even2 = d[4] - d[2], odd2 = d[3] - d[1];
    o[0] = four * d[0] + (d[4] - five * d[2]);
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = two * odd2 + even2;
    o[4] = even2 - two * odd2;
    o[5] = four * d[1] + (d[5] - five * d[3]);
  } else if constexpr (Size == 3) {
    const V odd = d[3] - d[1];
    o[0] = four * (d[0] - d[2]) + (odd + odd);
    o[1] = three * ((d[3] - d[2]) - two * d[1]);
    o[2] = two * d[1] + (d[3] - three * d[2]);
    o[3] = four * odd;
    o[5] = (d[4] - d[2]) - two * odd;
  } else {
    o[0] = four * (d[0] - d[2]);
    o[1] = -three * (d[1] + d[2]);
    o[2] = three * (d[1] - d[2]);
    o[5] = d[3] - d[1];
  }
}

// A^T m: the points to Size outputs.
template <int Size, class V>
R2N_INLINE void output_points(const V* m, V* o) {
  const V two = broadcast<V>(2), four = broadcast<V>(4), eight = broadcast<V>(8);
  const V even = m[1] + m[2], odd = m[1] - m[2];
  if constexpr (Size == 4) {
    const V even2 = m[3] + m[4], odd2 = m[3] - m[4];
    o[0] = m[0] + even + even2;
    o[1] = two * odd2 + odd;
    o[2] = four * even2 + even;
    o[3] = eight * odd2 + odd + m[5];
  } else if constexpr (Size == 3) {
    o[0] = m[0] + even + m[3];
    o[1] = two * m[3] + odd;
    o[2] = four * m[3] + even + m[5];
  } else {
    o[0] = m[0] + even;
    o[1] = odd + m[5];
  }
}

// A d: Size gradients of outputs to the points, the adjoint of output_points.
template <int Size, class V>
R2N_INLINE void gradient_points(const V* d, V* o) {
  const V two = broadcast<V>(2), four = broadcast<V>(4);
  o[0] = d[0];
  o[5] = d[Size - 1];
  if constexpr (Size == 4) {
    const V even = d[0] + d[2], odd = d[1] + d[3];
    const V even2 = d[0] + four * d[2], odd2 = two * (d[1] + four * d[3]);
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = even2 + odd2;
    o[4] = even2 - odd2;
  } else if constexpr (Size == 3) {
    const V even = d[0] + d[2];
    o[1] = even + d[1];
    o[2] = even - d[1];
    o[3] = d[0] + two * d[1] + four * d[2];
  } else {
    o[1] = d[0] + d[1];
    o[2] = d[0] - d[1];
  }
}

// G^T m: the points to the 3 taps of a weight's gradient.
template <class V>
R2N_INLINE void tap_points(const V* m, V* o) {
  const V sixth = broadcast<V>(1.0f / 6), twelfth = broadcast<V>(1.0f / 12), half = broadcast<V>(0.5f);
  const V even = (m[1] + m[2]) * sixth, even2 = (m[3] + m[4]) * twelfth;
  o[0] = broadcast<V>(0.25f) * m[0] - even + half * even2;
  o[1] = (m[3] - m[4]) * twelfth - (m[1] - m[2]) * sixth;
  o[2] = (even2 + even2) - even + m[5];
}

// Rows x Columns gradients of outputs, from load(row, column), to the points at z, `point` floats apart.
template <int Rows, int Columns, class V, class Load>
R2N_INLINE void transform_gradient(const Load& load_gradient, float* z, int64_t point) {
  V half[6][4];
#pragma GCC unroll 4
  for (int j = 0; j < Columns; j++) {
    V column[4], points[6];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; i++) column[i] = load_gradient(i, j);
    gradient_points<Rows>(column, points);
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
      if (uses_point<Rows>(i)) half[i][j] = points[i];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < 6; i++) {
    if (!uses_point<Rows>(i)) continue;
    V points[6];
    gradient_points<Columns>(half[i], points);
#pragma GCC unroll 6
    for (int j = 0; j < 6; j++) {
      if (uses_point<Columns>(j)) store(z + (i * 6 + j) * point, points[j]);
    }
  }
}

// (Rows + 2) x (Columns + 2) pixels at d to the points at v, `point` floats apart.
template <int Rows, int Columns, class V>
R2N_INLINE void transform_input(const float* d, int64_t row_pitch, int64_t pixel_pitch, float* v, int64_t point) {
  V half[6][6];
#pragma GCC unroll 6
  for (int j = 0; j < Columns + 2; j++) {
    V column[6], points[6];
#pragma GCC unroll 6
    for (int i = 0; i < Rows + 2; i++) column[i] = load<V>(d + i * row_pitch + j * pixel_pitch);
    input_points<Rows>(column, points);
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
      if (uses_point<Rows>(i)) half[i][j] = points[i];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < 6; i++) {
    if (!uses_point<Rows>(i)) continue;
    V points[6];
    input_points<Columns>(half[i], points);
#pragma GCC unroll 6
    for (int j = 0; j < 6; j++) {
      if (uses_point<Columns>(j)) store(v + (i * 6 + j) * point, points[j]);
    }
  }
}

// The points at m to Rows x Columns outputs, handed to emit(i, row of Columns outputs).
template <int Rows, int Columns, class V, class Emit>
R2N_INLINE void transform_output(const float* m, int64_t point, const Emit& emit) {
  V half[4][6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; j++) {
    if (!uses_point<Columns>(j)) continue;
    V points[6], column[4];
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
      if (uses_point<Rows>(i)) points[i] = load<V>(m + (i * 6 + j) * point);
    }
    output_points<Rows>(points, column);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; i++) half[i][j] = column[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; i++) {
    V outputs[4];
    output_points<Columns>(half[i], outputs);
    emit(i, outputs);
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
