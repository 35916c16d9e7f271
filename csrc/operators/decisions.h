// How an operator with a native body decides, call by call, who runs it. What Python says of one call (its checks, its choice of
// a backend, its settings) holds for every call of the same operator with arguments of the same kind under the same environment,
// and is kept. Where the process has no Python, `without_python` decides.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#define RES2NET_SHARED __attribute__((visibility("default")))

namespace res2net_fused {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::optional<std::vector<Tensor>>;
using OptionalString = std::optional<std::string>;

// own: whether the native kernels of the library that asks run the call, with these settings, whose meaning is the backend's.
struct Decision {
  bool own;
  std::array<int64_t, 16> settings;
};

// Everything that a decision depends on: the operator and its arguments, of tensors dtype, device, sizes and strides, and
// every environment variable of this package.
class RES2NET_SHARED Key {
 public:
  template <class... T>
  explicit Key(const char* operator_name, const T&... arguments) {
    begin(operator_name);
    (add(arguments), ...);
    add_environment();
  }
  ~Key();

  std::optional<Decision> find() const;
  void keep(const Decision& decision);

 private:
  void begin(const char* operator_name);
  void add(const Tensor& tensor);
  void add(const std::string& text);
  void add(int64_t value) { words_.push_back(value); }
  void add(bool value) { words_.push_back(value); }
  template <class T>
  void add(const std::optional<T>& value) {
    words_.push_back(value.has_value());
    if (value.has_value()) add(*value);
  }
  template <class T>
  void add(const std::vector<T>& values) {
    words_.push_back(static_cast<int64_t>(values.size()));
    for (const T& value : values) add(value);
  }
  void add_text(const char* text, size_t length);
  void add_environment();

  std::vector<int64_t> words_;
};

// Whether Python answers `ask_python`; it says so when it has registered its operators.
RES2NET_SHARED bool has_python();

// The environment variable, or "auto" where it is not set or empty.
RES2NET_SHARED std::string environment_or_auto(const char* name);

// Whether a call without Python runs on the backend `own`, else it does on "reference"; throws where another one is asked for.
// why_not: what speaks against the own kernels, or null.
RES2NET_SHARED bool own_without_python(const std::string& backend, const char* own, const char* why_not);

// Calls the operator `name` with `arguments`, which are all that its schema has, and returns what it returns first.
template <class Result, class... T>
Result call_operator(const char* name, const char* overload, const T&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

// What Python makes of a call: `outputs` where it ran it, else the decision. Throws, with Python's message, where it refuses.
struct Answer {
  Tensors outputs;
  Decision decision;
};
RES2NET_SHARED Answer answer_of(StableIValue* stack, const char* operator_name, const char* own);

template <class... T>
Answer ask_python(const char* operator_name, const char* own, const T&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  return answer_of(stack, operator_name, own);
}

// Python's outputs where it ran the call, else nothing, and then the decision. Where there is no Python `rule` makes it.
// beside: what it depends on that `arguments` do not tell, which are all of the operator's.
template <class Rule, class... T>
Tensors decide(
    Decision& decision, const char* operator_name, const char* own, const Rule& rule, int64_t beside, const T&... arguments) {
  Key key(operator_name, beside, arguments...);
  if (const auto known = key.find(); known.has_value()) {
    decision = *known;
    return {};
  }
  if (has_python()) {
    Answer answer = ask_python(operator_name, own, arguments...);
    if (!answer.outputs.empty()) return std::move(answer.outputs);
    decision = answer.decision;
    STD_TORCH_CHECK(decision.own, operator_name, ": Python neither ran the call nor left it to the kernels of ", own);
  } else {
    decision = rule();
  }
  key.keep(decision);
  return {};
}

}  // namespace res2net_fused
