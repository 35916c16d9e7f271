// The chain along rows: products or PyTorch's convolutions, and between two of them one pass over memory: ReLU, the affine map,
// the group's place in the output, and what the next convolution reads. Other activations are a pass of PyTorch's before it. The twin of res2net_fused/backends/cpu/chain1d.py.
#include <algorithm>
#include <type_traits>

#include "cpu/ops/native_calls.h"

namespace res2net_fused {
namespace {

constexpr int64_t kRowsForProducts = 512;  // ROWS_FOR_PRODUCTS in res2net_fused/backends/policy.py
constexpr int64_t kGrain = 32768;          // values that one thread takes at least

// A group's values (N, w, L), as lines: of channels side by side, one for each place, or the other way round.
template <class T>
struct Lines {
  T* data;
  int64_t image, line, step;

  T* at(int64_t n, int64_t i) const { return data + n * image + i * line; }
};

template <class Run>
void for_lines(int64_t batch, int64_t lines, int64_t size, const Run& run) {
  torch::stable::parallel_for(0, batch * lines, std::max<int64_t>(1, kGrain / size), [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at++) run(at / lines, at % lines);
  });
}

// Of a place in a row that may lie beyond its ends.
int64_t mirrored(int64_t place, int64_t length) {
  if (place < 0) return -place;
  return place < length ? place : 2 * (length - 1) - place;
}

template <class T>
void add(const T* x, int64_t x_step, const T* y, int64_t y_step, T* __restrict out, int64_t step, int64_t size) {
  if (y == nullptr) {
    for (int64_t i = 0; i < size; i++) out[i * step] = x[i * x_step];
  } else {
    for (int64_t i = 0; i < size; i++) out[i * step] = x[i * x_step] + y[i * y_step];
  }
}

// One call of the chain in x's type. `products`: lines hold channels side by side, else places.
template <class T>
class Rows {
 public:
  Rows(const RowsChain& chain, bool products)
      : chain_(chain), g_(geometry_of(chain)), products_(products), rectifies_(chain.activation == "relu"),
        x_strides_{chain.x.stride(0), chain.x.stride(1), chain.x.stride(2)} {
    STD_TORCH_CHECK(chain.x.is_cpu(), "x must be on the CPU");
    x_ = static_cast<const T*>(chain.x.const_data_ptr());
    out_ = empty({g_.batch, chain.x.size(1), g_.length});
    if (chain.scale.has_value()) scale_ = concatenated(*chain.scale), shift_ = concatenated(*chain.shift);
    const int64_t border = products_ ? 0 : 2 * g_.padding;  // products read rows from `taps_`
    u_ = empty(products_ ? Ints{g_.batch, g_.length, g_.width} : Ints{g_.batch, g_.width, g_.length + border});
    if (border > 0) torch::stable::zero_(u_);
    if (products_ && g_.taps > 1) taps_ = empty({g_.batch * g_.length, g_.taps * g_.width});
  }

  Tensors run(const OptionalTensors& packed) {
    if (g_.passed >= 0) sum(input(g_.passed), nullptr, output(g_.passed));
    const Lines<const T> added = g_.added >= 0 ? input(g_.added) : Lines<const T>{};
    sum(input(g_.first), g_.added >= 0 ? &added : nullptr, next());
    const Tensors factors = products_ ? factors_of(packed) : Tensors{};
    Tensors results{out_};
    for (int64_t k = 0; k < g_.steps; k++) {
      const size_t step = static_cast<size_t>(k);
      std::optional<Tensor> bias;
      if (chain_.biases.has_value()) bias = in_type_of(chain_.x, chain_.biases->at(step));
      if (!products_) reflect();
      const Tensor z =
          products_ ? product(factors[step], bias) : plain_convolution(u_, chain_.weights[step], bias, 1, 0, g_.dilation, 1);
      const Tensor dense = z.is_contiguous() ? z : torch::stable::contiguous(z);
      const Tensor r = rectifies_ ? dense : plain_activation(dense, chain_.activation);
      const Tensor& left = g_.keeps_input ? dense : r;
      Tensor kept = left;
      if (chain_.keep && products_) kept = empty({g_.batch, g_.width, g_.length});
      finish(k, r, left, kept);
      if (chain_.keep) results.push_back(kept);
    }
    return results;
  }

 private:
  using Ints = std::vector<int64_t>;

  int64_t lines() const { return products_ ? g_.length : g_.width; }
  int64_t size() const { return products_ ? g_.width : g_.length; }

  Tensor empty(const Ints& sizes) const { return torch::stable::empty(sizes, chain_.x.scalar_type()); }

  // Vectors of every convolution, one behind the other; by an operator, which reads values that are not in memory as well.
  Tensor concatenated(const Tensors& vectors) const {
    return in_type_of(chain_.x, call_operator<Tensor>("aten::cat", "", vectors, int64_t{0}));
  }

  Lines<const T> input(int64_t group) const {
    const auto [image, channel, place] = x_strides_;
    const T* const data = x_ + group * g_.width * channel;
    return products_ ? Lines<const T>{data, image, place, channel} : Lines<const T>{data, image, channel, place};
  }

  // Of a tensor (N, channels, L).
  Lines<T> contiguous(const Tensor& t, int64_t channels, int64_t group) const {
    T* const data = static_cast<T*>(t.mutable_data_ptr()) + group * g_.width * g_.length;
    const int64_t image = channels * g_.length;
    return products_ ? Lines<T>{data, image, 1, g_.length} : Lines<T>{data, image, g_.length, 1};
  }

  Lines<T> output(int64_t group) const { return contiguous(out_, chain_.x.size(1), group); }

  // What the next convolution reads.
  Lines<T> next() const {
    T* const data = static_cast<T*>(u_.mutable_data_ptr());
    if (products_) return {data, g_.length * g_.width, g_.width, 1};
    const int64_t row = g_.length + 2 * g_.padding;
    return {data + g_.padding, g_.width * row, row, 1};
  }

  void sum(const Lines<const T>& x, const Lines<const T>* y, const Lines<T>& out) const {
    for_lines(g_.batch, lines(), size(), [&](int64_t n, int64_t i) {
      add(x.at(n, i), x.step, y == nullptr ? nullptr : y->at(n, i), y == nullptr ? 0 : y->step, out.at(n, i), out.step, size());
    });
  }

  void reflect() const {
    if (!g_.reflects || g_.padding == 0) return;
    const Lines<T> rows = next();
    for_lines(g_.batch, g_.width, 2 * g_.padding, [&](int64_t n, int64_t channel) {
      T* const row = rows.at(n, channel);
      for (int64_t i = 1; i <= g_.padding; i++) {
        row[-i] = row[i];
        row[g_.length - 1 + i] = row[g_.length - 1 - i];
      }
    });
  }

  Tensor product(const Tensor& factor, const std::optional<Tensor>& bias) const {
    const int64_t rows = g_.batch * g_.length, depth = g_.taps * g_.width;
    if (g_.taps > 1) gather();
    const Tensor& left = g_.taps > 1 ? taps_ : u_;
    return call_operator<Tensor>(
        "aten::linear", "", reinterpreted(left, {rows, depth}, {depth, 1}, 0),
        reinterpreted(factor, {g_.width, depth}, {1, g_.width}, 0), bias);
  }

  // `taps_` (N * L, k * w): every row's values under the taps, side by side.
  void gather() const {
    const T* const from = static_cast<const T*>(u_.const_data_ptr());
    T* const to = static_cast<T*>(taps_.mutable_data_ptr());
    for_lines(g_.batch, g_.length, g_.taps * g_.width, [&](int64_t n, int64_t place) {
      T* row = to + (n * g_.length + place) * g_.taps * g_.width;
      for (int64_t tap = 0; tap < g_.taps; tap++, row += g_.width) {
        int64_t source = place + tap * g_.dilation - g_.padding;
        if (g_.reflects) source = mirrored(source, g_.length);
        if (source < 0 || source >= g_.length) {
          std::fill_n(row, g_.width, T{0});
        } else {
          std::copy_n(from + (n * g_.length + source) * g_.width, g_.width, row);
        }
      }
    });
  }

  // activated: in lines, and rectified here where that is the activation. left: what is kept, in lines, and kept: that or where
  // it goes as (N, w, L).
  void finish(int64_t k, const Tensor& activated, const Tensor& left, const Tensor& kept) const {
    const int64_t group = g_.first + k, length = size();
    const Lines<T> out = output(group), u = next(), copy = contiguous(kept, g_.width, 0);
    const bool copies = kept.get() != left.get(), continues = k + 1 < g_.steps, maps = scale_.has_value();
    const Lines<const T> x = continues ? input(group + 1) : Lines<const T>{};
    T* const values = static_cast<T*>(activated.mutable_data_ptr());
    const T* const source = static_cast<const T*>(left.const_data_ptr());
    const T* const scale = maps ? static_cast<const T*>(scale_->const_data_ptr()) + k * g_.width : nullptr;
    const T* const shift = maps ? static_cast<const T*>(shift_->const_data_ptr()) + k * g_.width : nullptr;
    for_lines(g_.batch, lines(), length, [&](int64_t n, int64_t i) {
      T* const r = values + (n * lines() + i) * length;
      if (rectifies_) {
        for (int64_t j = 0; j < length; j++) r[j] = r[j] < 0 ? T{0} : r[j];
      }
      if (copies) add<T>(source + (n * lines() + i) * length, 1, nullptr, 0, copy.at(n, i), copy.step, length);
      T* const y = out.at(n, i);
      if (!maps) {
        add<T>(r, 1, nullptr, 0, y, out.step, length);
      } else if (products_) {
        for (int64_t j = 0; j < length; j++) y[j * out.step] = r[j] * scale[j] + shift[j];
      } else {
        for (int64_t j = 0; j < length; j++) y[j] = r[j] * scale[i] + shift[i];
      }
      if (continues) add<T>(x.at(n, i), x.step, y, out.step, u.at(n, i), u.step, length);
    });
  }

  Tensors factors_of(const OptionalTensors& packed) const {
    const int64_t depth = g_.taps * g_.width;
    const auto fits = [&](const Tensor& t) {
      return t.dim() == 2 && t.size(0) == depth && t.size(1) == g_.width && t.is_contiguous() && t.is_cpu() &&
             t.scalar_type() == chain_.x.scalar_type();
    };
    if (packed.has_value() && static_cast<int64_t>(packed->size()) == g_.steps &&
        std::all_of(packed->begin(), packed->end(), fits)) {
      return *packed;
    }
    Tensors factors;
    for (const Tensor& weight : chain_.weights) {
      factors.push_back(empty({depth, g_.width}));
      const T* const from = static_cast<const T*>(weight.const_data_ptr());
      T* const to = static_cast<T*>(factors.back().mutable_data_ptr());
      const int64_t out_stride = weight.stride(0), in_stride = weight.stride(1), tap_stride = weight.stride(2);
      for_lines(g_.taps, g_.width, g_.width, [&](int64_t tap, int64_t channel) {
        const T* const column = from + tap * tap_stride + channel * in_stride;
        add<T>(column, out_stride, nullptr, 0, to + (tap * g_.width + channel) * g_.width, 1, g_.width);
      });
    }
    return factors;
  }

  const RowsChain& chain_;
  const RowsGeometry g_;
  const bool products_, rectifies_;
  const std::array<int64_t, 3> x_strides_;
  const T* x_;
  Tensor out_, u_, taps_;
  std::optional<Tensor> scale_, shift_;
};

template <class T>
Tensors run_rows(const RowsChain& chain, const OptionalTensors& packed, bool multiplies) {
  return Rows<T>(chain, multiplies).run(packed);
}

}  // namespace

bool knows_rows_of(const Tensor& x) { return x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double; }

bool multiplies_rows(int64_t rows) { return 0 < rows && rows <= kRowsForProducts; }

Tensors rows_forward(const RowsChain& chain, const OptionalTensors& packed, bool multiplies) {
  STD_TORCH_CHECK(knows_rows_of(chain.x), "x must be float32 or float64");
  const auto run = chain.x.scalar_type() == ScalarType::Float ? run_rows<float> : run_rows<double>;
  return run(chain, packed, multiplies);
}

}  // namespace res2net_fused
