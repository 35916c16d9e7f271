// The chain and a network's stem in float64, written for clarity: what the kernels are compared with.
#pragma once

#include <algorithm>

#include "cpu/chain/problem.h"
#include "cpu/chain/stem.h"
#include "values.h"

using namespace res2net_fused;

inline double activated(double z, Activation activation) {
  switch (activation.kind) {
    case Activation::relu:
      return z < 0 ? 0 : z;
    case Activation::hardtanh20:
      return z < 0 ? 0 : z > 20 ? 20 : z;
    case Activation::relu6:
      return z < 0 ? 0 : z > 6 ? 6 : z;
    case Activation::leaky_relu:
      return z > 0 ? z : z * static_cast<double>(activation.slope);
    case Activation::hardswish:
      return z * std::min(std::max(z + 3, 0.0), 6.0) / 6;
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::gelu:
      return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return z * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::mish:
      return z * std::tanh(std::log1p(std::exp(z)));
    default:
      return z;
  }
}

// Weights (w, w/groups, 3, 3) and a bias (w,) for each convolution.
struct ChainWeights {
  std::vector<Floats> weights, biases;
};

// x (N, H, W, s*w) -> (N, H/stride, W/stride, s*w)
class ReferenceChain {
 public:
  ReferenceChain(const ChainProblem& problem, const Floats& x, const ChainWeights& with)
      : p_(problem), x_(x.begin(), x.end()), with_(with), out_(count(p_.out_height(), p_.out_width()) * wide()) {}

  Doubles run() {
    const int64_t w = p_.channels;
    if (p_.passed_group() >= 0) pass();
    for (int64_t i = 0; i < p_.steps; i++) {
      const int64_t group = p_.first_convolved() + i;
      Doubles u(static_cast<size_t>(count(p_.height, p_.width) * static_cast<size_t>(w)));
      for (int64_t pixel = 0; pixel < static_cast<int64_t>(u.size()) / w; pixel++) {
        for (int64_t c = 0; c < w; c++) {
          double& value = u[static_cast<size_t>(pixel * w + c)];
          value = x_[static_cast<size_t>((pixel * p_.scale() + group) * w + c)];
          if (p_.adds(group)) value += out_[static_cast<size_t>((pixel * p_.scale() + group - 1) * w + c)];
        }
      }
      convolve(u, i, group);
    }
    return out_;
  }

 private:
  size_t wide() const { return static_cast<size_t>(p_.scale() * p_.channels); }
  size_t count(int64_t height, int64_t width) const { return static_cast<size_t>(p_.batch * height * width); }

  double& out_at(int64_t n, int64_t y, int64_t x, int64_t group, int64_t c) {
    const int64_t pixel = (n * p_.out_height() + y) * p_.out_width() + x;
    return out_[static_cast<size_t>((pixel * p_.scale() + group) * p_.channels + c)];
  }

  template <class F>
  void for_each_output(const F& f) {
    for (int64_t n = 0; n < p_.batch; n++) {
      for (int64_t y = 0; y < p_.out_height(); y++) {
        for (int64_t x = 0; x < p_.out_width(); x++) f(n, y, x);
      }
    }
  }

  void convolve(const Doubles& u, int64_t i, int64_t group) {
    const int64_t w = p_.channels, depth = w / p_.groups;
    const Floats &weight = with_.weights[static_cast<size_t>(i)], &bias = with_.biases[static_cast<size_t>(i)];
    for_each_output([&](int64_t n, int64_t y, int64_t x) {
      for (int64_t o = 0; o < w; o++) {
        double sum = static_cast<double>(bias[static_cast<size_t>(o)]);
        for (int64_t tap = 0; tap < 9; tap++) {
          const int64_t row = y * p_.stride + (tap / 3 - 1) * p_.dilation, column = x * p_.stride + (tap % 3 - 1) * p_.dilation;
          if (row < 0 || row >= p_.height || column < 0 || column >= p_.width) continue;
          const double* from = &u[static_cast<size_t>(((n * p_.height + row) * p_.width + column) * w + o / depth * depth)];
          for (int64_t k = 0; k < depth; k++) {
            sum += from[k] * static_cast<double>(weight[static_cast<size_t>((o * depth + k) * 9 + tap)]);
          }
        }
        out_at(n, y, x, group, o) = activated(sum, p_.activation);
      }
    });
  }

  void pass() {
    const int64_t group = p_.passed_group();
    for_each_output([&](int64_t n, int64_t y, int64_t x) {
      for (int64_t c = 0; c < p_.channels; c++) {
        const auto at = [&](int64_t row, int64_t column) {
          return x_[static_cast<size_t>((((n * p_.height + row) * p_.width + column) * p_.scale() + group) * p_.channels + c)];
        };
        double sum = 0;
        int64_t inside = 0;
        for (int64_t tap = 0; tap < 9; tap++) {
          const int64_t row = y * p_.stride + tap / 3 - 1, column = x * p_.stride + tap % 3 - 1;
          if (row < 0 || row >= p_.height || column < 0 || column >= p_.width) continue;
          sum += at(row, column);
          inside++;
        }
        const double divisor = p_.pool == Pool::avg3 ? 9 : static_cast<double>(inside);
        out_at(n, y, x, group, c) = p_.pool == Pool::none ? at(y * p_.stride, x * p_.stride) : sum / divisor;
      }
    });
  }

  const ChainProblem& p_;
  const Doubles x_;
  const ChainWeights& with_;
  Doubles out_;
};

// An image of a stem, (H, W, C).
struct Plane {
  int64_t height, width, channels;
  Doubles values{};

  double& at(int64_t y, int64_t x, int64_t c) { return values[static_cast<size_t>((y * width + x) * channels + c)]; }
  bool holds(int64_t y, int64_t x) const { return 0 <= y && y < height && 0 <= x && x < width; }
  void make_room() { values.resize(static_cast<size_t>(height * width * channels)); }
};

// weight (C', kernel height, kernel width, C)
inline Plane convolved(Plane& source, const StemConvolution& c, const Floats& weight, const Floats& bias) {
  Plane out{
      convolved_size(source.height, c.kernel_height, c.row_stride, c.row_padding),
      convolved_size(source.width, c.kernel_width, c.column_stride, c.column_padding), c.channels};
  out.make_room();
  for (int64_t i = 0; i < static_cast<int64_t>(out.values.size()); i++) {
    const int64_t o = i % c.channels, x = i / c.channels % out.width, y = i / c.channels / out.width;
    double sum = static_cast<double>(bias[static_cast<size_t>(o)]);
    for (int64_t tap = 0; tap < c.kernel_height * c.kernel_width; tap++) {
      const int64_t row = y * c.row_stride - c.row_padding + tap / c.kernel_width,
                    column = x * c.column_stride - c.column_padding + tap % c.kernel_width;
      if (!source.holds(row, column)) continue;
      for (int64_t k = 0; k < source.channels; k++) {
        const int64_t from = (o * c.kernel_height * c.kernel_width + tap) * source.channels + k;
        sum += source.at(row, column, k) * static_cast<double>(weight[static_cast<size_t>(from)]);
      }
    }
    out.at(y, x, o) = activated(sum, {Activation::relu});
  }
  return out;
}

// The largest of 3x3 pixels around every second one, of those inside; NaN where one is.
inline Plane max_pooled(Plane& source) {
  Plane out{pooled_size(source.height), pooled_size(source.width), source.channels};
  out.make_room();
  for (int64_t i = 0; i < static_cast<int64_t>(out.values.size()); i++) {
    const int64_t c = i % out.channels, x = i / out.channels % out.width, y = i / out.channels / out.width;
    double largest = source.at(2 * y, 2 * x, c);
    for (int64_t tap = 0; tap < 9; tap++) {
      const int64_t row = 2 * y - 1 + tap / 3, column = 2 * x - 1 + tap % 3;
      if (!source.holds(row, column)) continue;
      const double value = source.at(row, column, c);
      if (std::isnan(value) || value > largest) largest = value;
    }
    out.at(y, x, c) = largest;
  }
  return out;
}

// (N, H', W', C'); of `data` weights, biases and the output are not read.
inline Doubles stem(const StemData& data, const ChainWeights& with) {
  Doubles out;
  for (int64_t n = 0; n < data.batch; n++) {
    Plane plane{data.height, data.width, data.channels};
    plane.make_room();
    for (int64_t i = 0; i < static_cast<int64_t>(plane.values.size()); i++) {
      const int64_t c = i % data.channels, x = i / data.channels % data.width, y = i / data.channels / data.width;
      plane.at(y, x, c) = static_cast<double>(data.x[n * data.image + y * data.row + x * data.pixel + c * data.channel]);
    }
    for (size_t i = 0; i < data.convolutions.size(); i++) {
      plane = convolved(plane, data.convolutions[i], with.weights[i], with.biases[i]);
    }
    if (data.pools) plane = max_pooled(plane);
    out.insert(out.end(), plane.values.begin(), plane.values.end());
  }
  return out;
}
