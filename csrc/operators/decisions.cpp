#include "operators/decisions.h"

#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string_view>
#include <unordered_map>

namespace res2net_fused {
namespace {

constexpr size_t kLargest = 4096;  // decisions, then all are forgotten: of ever new shapes there is no end
constexpr std::string_view kPrefix = "RES2NET_FUSED_";

using Words = std::vector<int64_t>;

struct Hash {
  size_t operator()(const Words& words) const {
    uint64_t hash = words.size();
    for (const int64_t word : words) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

struct Decisions {
  std::shared_mutex mutex;
  std::unordered_map<Words, Decision, Hash> known;
};

// Never destroyed: threads may call operators while the process ends.
Decisions& decisions() {
  static Decisions& all = *new Decisions;
  return all;
}

std::atomic<bool> python_answers{false};

// The memory of a key that is done with, for the thread's next one.
thread_local Words spare;

// What Python says beside the outputs, in the thread that it was asked in: of several results the dispatcher's C interface mixes
// up the types (torch 2.13).
struct Said {
  std::string backend, refusal;
  std::vector<int64_t> settings;
};
thread_local Said said;

void say(const std::string& backend, const std::vector<int64_t>& settings, const std::string& refusal) {
  said = {backend, refusal, settings};
}

int64_t known_decisions(bool forget) {
  Decisions& all = decisions();
  const std::unique_lock lock(all.mutex);
  const int64_t count = static_cast<int64_t>(all.known.size());
  if (forget) all.known.clear();
  return count;
}

// What was decided without Python holds no longer.
void answer_by_python(bool answers) {
  python_answers = answers;
  known_decisions(true);
}

}  // namespace

void Key::begin(const char* operator_name) {
  words_ = std::move(spare);
  words_.clear();
  words_.reserve(256);
  add_text(operator_name, std::strlen(operator_name));
}

Key::~Key() {
  if (words_.capacity() > spare.capacity()) spare = std::move(words_);
}

void Key::add(const Tensor& tensor) {
  const size_t dim = static_cast<size_t>(tensor.dim());
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  words_.push_back(static_cast<int64_t>(tensor.scalar_type()) << 32 | static_cast<int64_t>(dim));
  words_.push_back(static_cast<int64_t>(tensor.device().type()));
  words_.push_back(static_cast<int64_t>(tensor.get_device_index()));  // -1 where a type has one device
  for (size_t i = 0; i < dim; i++) words_.push_back(sizes[i]);
  for (size_t i = 0; i < dim; i++) words_.push_back(strides[i]);
}

void Key::add(const std::string& text) { add_text(text.data(), text.size()); }

void Key::add_text(const char* text, size_t length) {
  words_.push_back(static_cast<int64_t>(length));
  for (size_t at = 0; at < length; at += sizeof(int64_t)) {
    int64_t word = 0;
    std::memcpy(&word, text + at, std::min(length - at, sizeof(word)));
    words_.push_back(word);
  }
}

// One walk for all of them. As every getenv, it must not meet a setenv of another thread, which glibc up to 2.40 does not allow.
void Key::add_environment() {
  for (char** variable = environ; variable != nullptr && *variable != nullptr; variable++) {
    if (**variable != 'R' || std::strncmp(*variable, kPrefix.data(), kPrefix.size()) != 0) continue;
    const char* const rest = *variable + kPrefix.size();
    add_text(rest, std::strlen(rest));
  }
}

std::optional<Decision> Key::find() const {
  Decisions& all = decisions();
  const std::shared_lock lock(all.mutex);
  const auto found = all.known.find(words_);
  if (found == all.known.end()) return std::nullopt;
  return found->second;
}

void Key::keep(const Decision& decision) {
  Decisions& all = decisions();
  const std::unique_lock lock(all.mutex);
  if (all.known.size() >= kLargest) all.known.clear();
  all.known.insert_or_assign(words_, decision);
}

bool has_python() { return python_answers; }

std::string environment_or_auto(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr || *value == '\0' ? "auto" : value;
}

bool own_without_python(const std::string& backend, const char* own, const char* why_not) {
  const std::string name = backend == "auto" ? environment_or_auto("RES2NET_FUSED_BACKEND") : backend;
  if (name == "auto") return why_not == nullptr;
  if (name == "reference") return false;
  STD_TORCH_CHECK(name == own, "backend '", name, "' cannot run here: without Python there are '", own, "' and 'reference'");
  STD_TORCH_CHECK(why_not == nullptr, "backend '", name, "' cannot run: ", why_not);
  return true;
}

Answer answer_of(StableIValue* stack, const char* operator_name, const char* own) {
  const std::string name = std::string("res2net_fused_python::") + operator_name;
  said = {};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION));
  Answer answer{torch::stable::detail::to<Tensors>(stack[0]), {}};
  if (!said.refusal.empty()) throw std::runtime_error(said.refusal);
  answer.decision.own = said.backend == own;
  auto& settings = answer.decision.settings;
  std::copy_n(said.settings.begin(), std::min(said.settings.size(), settings.size()), settings.begin());
  return answer;
}

}  // namespace res2net_fused

STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) {
  m.def("answer_by_python(bool answers) -> ()");
  m.def("known_decisions(bool forget) -> int");
  m.def("say(str backend, int[] settings, str refusal) -> ()");
}

// An operator without tensor arguments has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeExplicitAutograd, m) {
  m.impl("answer_by_python", TORCH_BOX(&res2net_fused::answer_by_python));
  m.impl("known_decisions", TORCH_BOX(&res2net_fused::known_decisions));
  m.impl("say", TORCH_BOX(&res2net_fused::say));
}
