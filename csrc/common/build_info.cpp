#include "common/build_info.h"

#include <sstream>

#if !defined(RES2NET_FUSED_COMMIT) || !defined(RES2NET_FUSED_INSTRUCTION_SETS) || !defined(RES2NET_FUSED_TORCH_TARGET) || \
    !defined(RES2NET_FUSED_CUDA_VERSION) || !defined(RES2NET_FUSED_CUDA_ARCHS)
#error "compile through setup.py: res2net_fused/_native/build_flags.py defines what this file reports"
#endif

namespace res2net_fused {
namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ';');) parts.push_back(part);
  return parts;
}

// Compiler versions and commits are plain text; quotes and backslashes are escaped, control characters dropped.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (static_cast<unsigned char>(c) < 0x20) continue;
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

std::string quoted(const std::vector<std::string>& list) {
  std::string out = "[";
  for (const auto& item : list) out += (out.size() > 1 ? ", " : "") + quoted(item);
  return out + "]";
}

}  // namespace

BuildInfo build_info() {
  BuildInfo info;
#if defined(__clang__)
  info.compiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
  info.compiler = "GCC " __VERSION__;
#else
  info.compiler = "unknown";
#endif
  info.cxx_standard = __cplusplus;
  info.torch_target = RES2NET_FUSED_TORCH_TARGET;
  info.commit = RES2NET_FUSED_COMMIT;
  info.instruction_sets = split(RES2NET_FUSED_INSTRUCTION_SETS);
  info.cuda_version = RES2NET_FUSED_CUDA_VERSION;
  info.cuda_architectures = split(RES2NET_FUSED_CUDA_ARCHS);
  return info;
}

std::string to_json(const BuildInfo& info) {
  std::ostringstream out;
  out << "{\"compiler\": " << quoted(info.compiler) << ", \"cxx_standard\": " << info.cxx_standard
      << ", \"torch_target\": " << quoted(info.torch_target) << ", \"commit\": " << quoted(info.commit)
      << ", \"instruction_sets\": " << quoted(info.instruction_sets)
      << ", \"cuda_version\": " << (info.cuda_version.empty() ? "null" : quoted(info.cuda_version))
      << ", \"cuda_architectures\": " << quoted(info.cuda_architectures) << "}";
  return out.str();
}

}  // namespace res2net_fused
