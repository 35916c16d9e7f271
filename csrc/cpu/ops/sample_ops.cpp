// torch.ops.res2net_fused_native.cpu_samples and cpu_samples_differ: a few elements of each of a block's tensors, by which
// writes are noticed that PyTorch does not see.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstring>

#include "cpu/ops/op_arguments.h"

namespace res2net_fused {
namespace {

constexpr int64_t kSamples = 16;  // of each tensor: the first element, the last, and others in between

// Where sample k lies in a dimension, as a part of its size: multiples of four numbers that spread evenly between 0 and 1.
constexpr auto kPlaces = [] {
  constexpr double steps[4] = {0.6180339887, 0.7548776662, 0.8191725134, 0.5698402910};
  std::array<std::array<double, kSamples>, 4> places{};
  for (int64_t d = 0; d < 4; d++) {
    for (int64_t k = 0; k < kSamples; k++) {
      const double turns = static_cast<double>(k) * steps[d];
      places[d][k] = turns - static_cast<double>(static_cast<int64_t>(turns));
    }
  }
  return places;
}();

template <typename Bits>
char* copy_samples(const void* from, const std::array<int64_t, kSamples>& offsets, char* to) {
  for (const int64_t offset : offsets) {
    std::memcpy(to, static_cast<const Bits*>(from) + offset, sizeof(Bits));
    to += sizeof(Bits);
  }
  return to;
}

// The raw elements of the tensors that are on the CPU and lie in their storages, which may have been freed or made smaller.
std::vector<char> read_samples(const std::vector<Tensor>& tensors) {
  std::vector<char> bytes(tensors.size() * kSamples * sizeof(double));
  char* to = bytes.data();
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_cpu() || tensor.numel() == 0) continue;
    int64_t stored = 0, last = 0;
    STD_TORCH_CHECK(aoti_torch_get_storage_size(tensor.get(), &stored) == 0, "a tensor has no storage");
    std::array<int64_t, kSamples> offsets{};
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    for (size_t d = 0; d < sizes.size(); d++) {
      const auto& places = kPlaces[d % kPlaces.size()];
      for (int64_t k = 0; k < kSamples; k++) {
        offsets[k] += static_cast<int64_t>(places[k] * static_cast<double>(sizes[d])) * strides[d];
      }
      last += (sizes[d] - 1) * strides[d];
    }
    offsets.back() = last;
    const int64_t item = static_cast<int64_t>(tensor.element_size());
    if ((tensor.storage_offset() + last + 1) * item > stored) continue;
    const void* from = tensor.const_data_ptr();
    switch (item) {
      case 1:
        to = copy_samples<uint8_t>(from, offsets, to);
        break;
      case 2:
        to = copy_samples<uint16_t>(from, offsets, to);
        break;
      case 4:
        to = copy_samples<uint32_t>(from, offsets, to);
        break;
      case 8:
        to = copy_samples<uint64_t>(from, offsets, to);
        break;
    }
  }
  bytes.resize(to - bytes.data());
  return bytes;
}

Tensor samples(const std::vector<Tensor>& tensors) {
  const std::vector<char> bytes = read_samples(tensors);
  const int64_t sizes[1] = {static_cast<int64_t>(bytes.size())};
  const Tensor result = torch::stable::empty({sizes, 1}, ScalarType::Byte);
  if (!bytes.empty()) std::memcpy(result.mutable_data_ptr(), bytes.data(), bytes.size());
  return result;
}

bool samples_differ(const std::vector<Tensor>& tensors, const Tensor& before) {
  STD_TORCH_CHECK(
      before.is_cpu() && before.scalar_type() == ScalarType::Byte && before.is_contiguous(),
      "before must be what cpu_samples returned");
  const std::vector<char> bytes = read_samples(tensors);
  return static_cast<int64_t>(bytes.size()) != before.numel() ||
         (!bytes.empty() && std::memcmp(bytes.data(), before.const_data_ptr(), bytes.size()) != 0);
}

}  // namespace
}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def("cpu_samples(Tensor[] tensors) -> Tensor");
  m.def("cpu_samples_differ(Tensor[] tensors, Tensor before) -> bool");
}

// CompositeImplicitAutograd: parameters come as they are, on any device, and what is read of them has no gradient.
STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeImplicitAutograd, m) {
  m.impl("cpu_samples", TORCH_BOX(&res2net_fused::samples));
  m.impl("cpu_samples_differ", TORCH_BOX(&res2net_fused::samples_differ));
}
