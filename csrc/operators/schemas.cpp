// libres2net_fused_ops.so: what the operators of res2net_fused are, before it is known which library runs them.
#include <torch/csrc/stable/library.h>

#include "operators/decisions.h"

// From torch 2.12 on; null before.
extern "C" {
__attribute__((weak)) int32_t torch_tag_needs_exact_strides();
__attribute__((weak)) int32_t torch_tag_pt2_compliant_tag();
__attribute__((weak)) AOTITorchError
torch_library_def_with_tags(TorchLibraryHandle self, const char* schema, const int32_t* tags, int32_t num_tags);
}

namespace {

constexpr const char* kSchemas[] = {
#include "schemas.inc"
};

// By the C functions, whose failure is an answer: Python, where this library came late, has defined the operator already. Never
// deleted, as libraries are not unloaded.
void define_all() {
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_fragment("res2net_fused", __FILE__, __LINE__, &library) != AOTI_TORCH_SUCCESS) return;
  for (const char* schema : kSchemas) {
    if (torch_library_def_with_tags != nullptr) {
      const int32_t tags[] = {torch_tag_pt2_compliant_tag(), torch_tag_needs_exact_strides()};
      torch_library_def_with_tags(library, schema, tags, 2);
    } else {
      aoti_torch_library_def(library, schema);
    }
  }
}

[[maybe_unused]] const bool kDefined = (define_all(), true);

}  // namespace
