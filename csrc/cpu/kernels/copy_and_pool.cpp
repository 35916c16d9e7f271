// Row by row, at the speed of memory: the first source of a chain, and the group that passes it by.
#include "kernels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

// As in ATen's pool: NaN stays.
Full larger_or_nan(Full most, Full v) {
  most = v > most ? v : most;
  return v != v ? v : most;
}

void pool_row(
    ConstView source, int64_t in_height, int64_t in_width, View target, int64_t n, int64_t y, int64_t width, int64_t channels,
    int64_t stride, Pool pool) {
  const int64_t top = y * stride - 1, first_row = top < 0 ? 0 : top, last_row = smaller(top + 3, in_height);
  for (int64_t x = 0; x < width; x++) {
    const int64_t left = x * stride - 1, first_column = left < 0 ? 0 : left, last_column = smaller(left + 3, in_width);
    const int64_t counted = (last_row - first_row) * (last_column - first_column);
    const float divisor = static_cast<float>(pool == Pool::avg3 ? 9 : counted);
    float* to = target.at(n, y, x);
    for_channels(channels, [&]<bool Part>(int64_t c, int64_t lanes) {
      const bool averages = pool != Pool::max3;
      Full found = averages ? Full{} : broadcast<Full>(-__builtin_inff());
      for (int64_t i = first_row; i < last_row; i++) {
        for (int64_t j = first_column; j < last_column; j++) {
          const Full v = load_some<Part, Full>(source.at(n, i, j) + c, lanes);
          found = averages ? found + v : larger_or_nan(found, v);
        }
      }
      store_some<Part>(to + c, averages ? found / broadcast<Full>(divisor) : found, lanes);
    });
  }
}

}  // namespace

void copy_rows(
    ConstView source, ConstView plus, View target, int64_t height, int64_t width, int64_t channels, int64_t first,
    int64_t last) {
  for (int64_t row = first; row < last; row++) {
    const int64_t n = row / height, y = row % height;
    for (int64_t x = 0; x < width; x++) {
      const float* from = source.at(n, y, x);
      const float* added = plus.data == nullptr ? nullptr : plus.at(n, y, x);
      float* to = target.at(n, y, x);
      for_channels(channels, [&]<bool Part>(int64_t c, int64_t lanes) R2N_LAMBDA_INLINE {
        Full v = load_some<Part, Full>(from + c, lanes);
        if (added != nullptr) v += load_some<Part, Full>(added + c, lanes);
        store_some<Part>(to + c, v, lanes);
      });
    }
  }
}

void pass_rows(
    ConstView source, int64_t in_height, int64_t in_width, View target, int64_t height, int64_t width, int64_t channels,
    int64_t stride, Pool pool, int64_t first, int64_t last) {
  if (pool == Pool::none) return copy_rows(source, ConstView{}, target, height, width, channels, first, last);
  for (int64_t row = first; row < last; row++) {
    pool_row(source, in_height, in_width, target, row / height, row % height, width, channels, stride, pool);
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
