// Row by row, at the speed of memory: the first source of a chain, and the group that passes it by.
#include "kernels.h"
#include "vector.h"

namespace res2net_fused::RES2NET_FUSED_ISA {
namespace {

// The larger one of each lane; NaN of either, as ATen's pooling has it.
R2N_INLINE Full larger(Full a, Full b) {
  const Full found = a > b ? a : b;  // b where they cannot be compared
  return a == a ? found : a;
}

void average_row(
    ConstView source, int64_t in_height, int64_t in_width, View target, int64_t n, int64_t y, int64_t width, int64_t channels,
    int64_t stride, bool counts_padding) {
  const int64_t top = y * stride - 1, first_row = top < 0 ? 0 : top, last_row = smaller(top + 3, in_height);
  for (int64_t x = 0; x < width; x++) {
    const int64_t left = x * stride - 1, first_column = left < 0 ? 0 : left, last_column = smaller(left + 3, in_width);
    const int64_t counted = counts_padding ? 9 : (last_row - first_row) * (last_column - first_column);
    const float divisor = static_cast<float>(counted);
    float* to = target.at(n, y, x);
    for_channels(channels, [&]<bool Part>(int64_t c, int64_t lanes) {
      Full sum{};
      for (int64_t i = first_row; i < last_row; i++) {
        for (int64_t j = first_column; j < last_column; j++) sum += load_some<Part, Full>(source.at(n, i, j) + c, lanes);
      }
      store_some<Part>(to + c, sum / broadcast<Full>(divisor), lanes);
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

// Of 3 rows at each column, then of columns x - 1, x, x + 1. At every second pixel the last of them is the next one's first.
void max_row(const MaxRow& m, const float* const* rows, float* out) {
  for_channels(m.channels, [&]<bool Part>(int64_t c, int64_t lanes) {
    const auto column = [&](int64_t x) R2N_LAMBDA_INLINE {
      const auto at = [&](int row) R2N_LAMBDA_INLINE { return load_some<Part, Full>(rows[row] + x * m.pixel + c, lanes); };
      return larger(larger(at(0), at(1)), at(2));
    };
    float* to = out + c;
    Full before = column(0);
    for (int64_t x = 0; x < m.in_pixels; x += m.stride, to += m.out_pixel) {
      if (x > 0 && m.stride != 2) before = column(x - 1);
      const Full here = column(x), behind = x + 1 < m.in_pixels ? column(x + 1) : here;
      store_some<Part>(to, larger(larger(before, here), behind), lanes);
      before = behind;
    }
  });
}

void pass_rows(
    ConstView source, int64_t in_height, int64_t in_width, View target, int64_t height, int64_t width, int64_t channels,
    int64_t stride, Pool pool, int64_t first, int64_t last) {
  if (pool == Pool::none) return copy_rows(source, ConstView{}, target, height, width, channels, first, last);
  const MaxRow max{in_width, source.pixel, channels, stride, target.pixel};
  for (int64_t row = first; row < last; row++) {
    const int64_t n = row / height, y = row % height, middle = y * stride;
    if (pool != Pool::max3) {
      average_row(source, in_height, in_width, target, n, y, width, channels, stride, pool == Pool::avg3);
      continue;
    }
    const int64_t above = middle > 0 ? middle - 1 : 0, below = smaller(middle + 1, in_height - 1);
    const float* const rows[] = {source.at(n, above, 0), source.at(n, middle, 0), source.at(n, below, 0)};
    max_row(max, rows, target.at(n, y, 0));
  }
}

}  // namespace res2net_fused::RES2NET_FUSED_ISA
