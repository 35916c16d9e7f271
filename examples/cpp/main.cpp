// Runs an AOTInductor package of an accelerated model without Python:
//
//   run_package libres2net_fused_cpu.so model.pt2 input.pt expected.pt
//
// input.pt and expected.pt are tensors that Python wrote with torch.save. Prints the largest difference and returns 0 where the
// package's output equals what is expected, with `bound` as a fifth argument where it is within that of it.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

at::Tensor read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, path, " cannot be read");
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return torch::pickle_load(bytes).toTensor();
}

int run(int count, char** arguments) {
  TORCH_CHECK(count >= 5, "usage: run_package LIBRARY PACKAGE INPUT EXPECTED [BOUND]");
  // The operators and their kernels; libres2net_fused_ops.so lies beside it. It may be linked instead.
  TORCH_CHECK(dlopen(arguments[1], RTLD_NOW), dlerror());
  const c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  const at::Tensor expected = read(arguments[4]), found = model.run({read(arguments[3])}).at(0);
  TORCH_CHECK(found.sizes() == expected.sizes(), "the output is ", found.sizes(), ", not ", expected.sizes());
  const double difference = (found - expected).abs().max().item<double>();
  std::printf("largest difference %g\n", difference);
  return difference <= (count > 5 ? std::atof(arguments[5]) : 0.0) ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_package: %s\n", error.what());
    return 2;
  }
}
