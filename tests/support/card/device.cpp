// CUDA devices in host memory, for a PyTorch without CUDA: tensors report cuda:i and are ordinary ones in every other way, and
// each operator runs PyTorch's CPU kernel on the same memory.
//
//   operator on cuda tensors -> `run_on_host` -> views of the same memory as cpu tensors -> the CPU kernel -> its results as cuda
//
// Streams and events exist and are counted, but work is done at once and in order. A capture keeps what it ran; a replay runs
// it again into the same memory. What a device would refuse is refused: two cards in one operator, a host that waits in one.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr int MOST_CARDS = 8;
std::atomic<int> cards{1};
std::atomic<int64_t> next_stream{1}, allocated[MOST_CARDS], peak[MOST_CARDS], counters[8];
enum Counter { EVENTS_RECORDED, WAITS, HOST_WAITS, TENSORS_RECORDED, OPERATORS, LAUNCHES };
thread_local c10::DeviceIndex current_card = 0;
thread_local int64_t current_streams[MOST_CARDS] = {};

// Captures --------------------------------------------------------------------------------------------------------------

struct Graph {
  std::vector<std::function<void()>> work;
  std::vector<at::Tensor> made;  // allocated by what was captured: a device leaves them unwritten until the first replay
};
struct Capture {
  Graph* graph = nullptr;
  int64_t stream = 0;
  int card = 0;
  bool broken = false;
};
std::recursive_mutex capture_mutex;
Capture capture;

bool captures_here() { return capture.graph != nullptr && current_streams[capture.card] == capture.stream; }

// Whatever makes the host wait for the device; the real one raises the same and gives the capture up.
void host_waits(const char* what) {
  counters[HOST_WAITS]++;
  if (capture.graph == nullptr) return;
  capture.broken = true;
  TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing (", what, ")");
}

// Streams and events ----------------------------------------------------------------------------------------------------

struct Event {
  const Graph* graph;  // in whose capture it was recorded
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    if (device.index() >= 0) current_card = device.index();
    return before;
  }
  c10::Device getDevice() const override { return {CUDA, current_card}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_card = device.index();
  }
  static int card_of(c10::Device device) { return device.index() < 0 ? current_card : device.index(); }
  c10::Stream stream(int card, int64_t id) const {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(CUDA, static_cast<c10::DeviceIndex>(card)), id);
  }
  c10::Stream getStream(c10::Device device) const override { return stream(card_of(device), current_streams[card_of(device)]); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(card_of(device), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(card_of(device), next_stream++); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    const c10::Stream before = getStream(to.device());
    current_streams[card_of(to.device())] = to.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream to) const override { return reinterpret_cast<void*>(to.id()); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    counters[EVENTS_RECORDED]++;
    if (*event == nullptr) *event = new Event;
    const bool inside = capture.graph != nullptr && on.id() == capture.stream;
    *static_cast<Event*>(*event) = {inside ? capture.graph : nullptr};
  }
  void block(void* event, const c10::Stream& waiting) const override {
    counters[WAITS]++;
    if (event == nullptr || capture.graph == nullptr || waiting.id() != capture.stream) return;
    if (static_cast<Event*>(event)->graph == capture.graph) return;
    capture.broken = true;
    TORCH_CHECK(false, "CUDA error: dependency created on uncaptured work in another stream");
  }
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(cards.load()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { host_waits("synchronize a stream"); }
  void synchronizeEvent(void*) const override { host_waits("synchronize an event"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { host_waits("synchronize the device"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override { counters[TENSORS_RECORDED]++; }
  bool isStreamCapturing(const c10::Stream& s) const override { return capture.graph != nullptr && s.id() == capture.stream; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// What ATen asks of a build with CUDA. There is no cuDNN: convolutions are the CPU's.
// Memory of the host that copies do not wait for, told by its addresses.
struct PinnedAllocator final : c10::Allocator {
  static inline std::mutex lock;
  static inline std::unordered_set<const void*> addresses;

  static void release(void* address) {
    const std::lock_guard<std::mutex> guard(lock);
    addresses.erase(address);
    c10::GetCPUAllocator()->raw_deallocate(address);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* address = c10::GetCPUAllocator()->raw_allocate(bytes);
    const std::lock_guard<std::mutex> guard(lock);
    if (address != nullptr) addresses.insert(address);
    return {address, address, &release, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedAllocator pinned_memory;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return cards; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(cards.load()); }
  c10::DeviceIndex current_device() const override { return current_card; }
  c10::DeviceIndex getCurrentDevice() const override { return current_card; }
  void setCurrentDevice(c10::DeviceIndex card) const override { current_card = card; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex card) const override { return Guard().exchangeDevice({CUDA, card}).index(); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex card) const override { return exchangeDevice(card); }
  void deviceSynchronize(c10::DeviceIndex) const override { host_waits("synchronize the device"); }
  // Of the CPU, whose kernels draw the numbers.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* address) const override {
    const std::lock_guard<std::mutex> guard(pinned_memory.lock);
    return pinned_memory.addresses.count(address) > 0;
  }
  c10::Allocator* getCUDADeviceAllocator() const override { return c10::GetCPUAllocator(); }
};

// Memory ----------------------------------------------------------------------------------------------------------------

struct Holder {  // of memory that a CPU kernel allocated, as the memory of a card
  c10::Storage storage;
  int card;
  int64_t bytes;
};
void free_holder(void* pointer) {
  auto* holder = static_cast<Holder*>(pointer);
  allocated[holder->card] -= holder->bytes;
  delete holder;
}
c10::DataPtr on_card(const c10::Storage& host, int card) {
  const int64_t bytes = static_cast<int64_t>(host.nbytes());
  const int64_t now = allocated[card] += bytes;
  for (int64_t most = peak[card]; now > most && !peak[card].compare_exchange_weak(most, now);) {
  }
  return {
      host.mutable_data(), new Holder{host, card, bytes}, free_holder, c10::Device(CUDA, static_cast<c10::DeviceIndex>(card))};
}
void free_storage(void* pointer) { delete static_cast<c10::Storage*>(pointer); }

// Sizes, strides and offset as those of `like`. base: the tensor of ours that this one is a view of.
at::Tensor tensor_over(
    c10::Storage storage, const at::Tensor& like, const at::Tensor* base = nullptr,
    c10::DispatchKey key = c10::DispatchKey::CUDA) {
  auto made = base == nullptr ? c10::make_intrusive<at::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype())
                              : c10::make_intrusive<at::TensorImpl>(
                                    c10::TensorImpl::VIEW, std::move(storage), base->key_set(), like.dtype());
  made->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  at::Tensor tensor(std::move(made));
  if (like.is_conj()) tensor._set_conj(true);
  if (like.is_neg()) tensor._set_neg(true);
  return tensor;
}

bool is_ours(const at::Tensor& t) { return t.defined() && t.key_set().has(c10::DispatchKey::CUDA) && t.has_storage(); }

// One operator ----------------------------------------------------------------------------------------------------------

// Operators whose result the host has to see, or that copy to where it may look at once.
const std::unordered_set<std::string> WAITING{
    "aten::_local_scalar_dense", "aten::nonzero",           "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_dim",          "aten::unique_consecutive"};
const std::unordered_set<std::string> ACROSS{
    "aten::copy_",        "aten::_copy_from", "aten::_copy_from_and_resize", "aten::set_",
    "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",      "aten::index"};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), name_(op.schema().name()) {
    const size_t count = op.schema().arguments().size();
    arguments_ = torch::jit::last(*stack, count).vec();
    torch::jit::drop(*stack, count);
  }

  void run(torch::jit::Stack* stack) {
    find_card();
    check_waiting();
    torch::jit::Stack results = compute();
    const auto graph = captures_here() ? capture.graph : nullptr;
    torch::jit::Stack ours;
    for (const c10::IValue& value : results) ours.push_back(to_card(value, graph));
    settle();
    if (graph != nullptr) {
      const Call again = *this;
      graph->work.push_back([again, ours]() mutable { Call(again).replay(ours); });
    }
    for (c10::IValue& value : ours) stack->push_back(std::move(value));
  }

 private:
  // Runs once more, its new results into the memory of the first ones.
  void replay(const torch::jit::Stack& first) {
    hosts_.clear();
    const torch::jit::Stack results = compute();
    for (size_t i = 0; i < results.size(); i++) copy_into(first[i], results[i]);
    settle();
  }
  void copy_into(const c10::IValue& to, const c10::IValue& from) {
    if (from.isTensor() && is_ours(to.toTensor())) {
      const at::Tensor& target = to.toTensor();
      if (!from.toTensor().defined() || from.toTensor().data_ptr() == target.data_ptr()) return;
      if (from.toTensor().sizes() != target.sizes()) return;  // an empty one, which an operator behind this one resized to fill
      on_host(target).copy_(from.toTensor());
    } else if (from.isTensorList()) {
      for (size_t i = 0; i < from.toTensorList().size(); i++)
        copy_into(c10::IValue(to.toTensorList().get(i)), c10::IValue(from.toTensorList().get(i)));
    }
  }

  void find_card() {
    int64_t on_host = 0;
    card_ = -1;
    const auto look = [&](const at::Tensor& t) {
      if (!t.defined()) return;
      if (!is_ours(t)) {
        on_host += t.dim() > 0 && t.device().is_cpu();
        return;
      }
      const int card = t.device().index();
      TORCH_CHECK(
          card_ < 0 || card_ == card || ACROSS.count(name_),
          "Expected all tensors to be on the same device, but found at least two devices, cuda:", card_, " and cuda:", card,
          "! (when checking arguments of ", name_, ")");
      if (card_ < 0) card_ = card;
    };
    for (const c10::IValue& value : arguments_) {
      each_tensor(value, look);
      if (value.isDevice() && value.toDevice().is_cuda()) {
        const int named = Guard::card_of(value.toDevice());
        TORCH_CHECK(named < cards, "CUDA error: invalid device ordinal");
        if (card_ < 0) card_ = named;
      }
    }
    TORCH_CHECK(
        on_host == 0 || ACROSS.count(name_),
        "Expected all tensors to be on the same device, but found at least two devices, cuda:", card_,
        " and cpu! (when checking arguments of ", name_, ")");
    if (card_ < 0) card_ = current_card;
    counters[OPERATORS]++;
  }

  void check_waiting() {
    bool waits = WAITING.count(name_) > 0;
    if (name_ == "aten::copy_") {
      const at::Tensor &to = arguments_[0].toTensor(), &from = arguments_[1].toTensor();
      const bool later = arguments_[2].toBool();
      waits = is_ours(to) != is_ours(from) && !(later && (is_ours(to) ? true : to.is_pinned())) && from.numel() > 0;
    }
    if (waits) host_waits(name_.c_str());
  }

  template <class Look>
  static void each_tensor(const c10::IValue& value, const Look& look) {
    if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorVector()) look(t);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
        if (t.has_value()) look(*t);
    }
  }

  torch::jit::Stack compute() {
    torch::jit::Stack stack;
    for (const c10::IValue& value : arguments_) stack.push_back(to_host(value));
    at::AutoDispatchBelowADInplaceOrView below;
    // CPUs without instructions for half types convolve in them a hundred times more slowly.
    std::optional<at::ScalarType> half;
    if (name_.rfind("aten::convolution", 0) == 0 && at::isReducedFloatingType(stack[0].toTensor().scalar_type())) {
      half = stack[0].toTensor().scalar_type();
      for (c10::IValue& value : stack)
        if (value.isTensor() && value.toTensor().defined()) value = value.toTensor().to(at::kFloat);
    }
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    for (c10::IValue& value : stack)
      if (half && value.isTensor() && value.toTensor().defined()) value = value.toTensor().to(*half);
    return stack;
  }

  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(host(t));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t.has_value() ? std::optional<at::Tensor>(host(*t)) : std::nullopt);
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::kCPU);
    return value;
  }

  at::Tensor host(const at::Tensor& t) {
    if (!is_ours(t)) return t;
    for (const auto& [ours, twin] : hosts_)
      if (ours.is_same(t)) return twin;
    hosts_.emplace_back(t, on_host(t));
    return hosts_.back().second;
  }

  at::Tensor on_host(const at::Tensor& t) { return tensor_over(host_storage(t), t, nullptr, c10::DispatchKey::CPU); }

  // One for all tensors of a storage, so that CPU kernels see which of them overlap.
  c10::Storage host_storage(const at::Tensor& t) {
    const c10::Storage& ours = t.storage();
    for (const auto& [tensor, twin] : hosts_)
      if (tensor.storage().is_alias_of(ours)) return twin.storage();
    c10::DataPtr data(ours.mutable_data(), new c10::Storage(ours), free_storage, c10::Device(c10::kCPU));
    return {c10::Storage::use_byte_size_t(), ours.nbytes(), std::move(data), c10::GetCPUAllocator(), true};
  }

  c10::IValue to_card(const c10::IValue& value, Graph* graph) {
    if (value.isTensor()) return card(value.toTensor(), graph);
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(card(t, graph));
    return list;
  }

  at::Tensor card(const at::Tensor& t, Graph* graph) {
    if (!t.defined() || !t.device().is_cpu() || !t.has_storage()) return t;
    for (const auto& [ours, twin] : hosts_)
      if (twin.is_same(t)) return ours;
    for (const auto& [ours, twin] : hosts_)  // a view
      if (twin.storage().is_alias_of(t.storage())) return tensor_over(ours.storage(), t, &ours);
    if (stays_on_host(t)) return t;
    c10::Storage storage(
        c10::Storage::use_byte_size_t(), t.storage().nbytes(), on_card(t.storage(), card_), c10::GetCPUAllocator(), true);
    at::Tensor made = tensor_over(std::move(storage), t);
    if (graph != nullptr) graph->made.push_back(made);
    return made;
  }

  // An operator that was given a cpu tensor to fill returns it.
  bool stays_on_host(const at::Tensor& t) const {
    bool found = false;
    for (const c10::IValue& value : arguments_) each_tensor(value, [&](const at::Tensor& given) { found |= given.is_same(t); });
    return found;
  }

  // What an operator resized or moved.
  void settle() {
    for (auto& [ours, twin] : hosts_) {
      const c10::Storage storage = ours.storage();
      if (twin.storage().data() != storage.data()) {
        storage.set_nbytes(twin.storage().nbytes());
        storage.set_data_ptr_noswap(on_card(twin.storage(), ours.device().index()));
      }
      if (twin.sizes() != ours.sizes() || twin.strides() != ours.strides() || twin.storage_offset() != ours.storage_offset())
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(twin.sizes(), twin.strides(), twin.storage_offset());
    }
  }

  c10::OperatorHandle op_;
  std::string name_;
  torch::jit::Stack arguments_;
  std::vector<std::pair<at::Tensor, at::Tensor>> hosts_;  // a tensor of ours, and the same memory as a cpu tensor
  int card_ = -1;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // Only in a capture, which is one thread's: others may come here with Python's lock, which the holder of this one may need.
  std::unique_lock<std::recursive_mutex> lock(capture_mutex, std::defer_lock);
  if (captures_here()) lock.lock();
  Call(op, stack).run(stack);
}
void record_stream(at::Tensor&, at::Stream) { counters[TENSORS_RECORDED]++; }
at::Tensor& set_(
    at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}
at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_(self, std::move(source), 0, {elements}, {1});
}
bool is_pinned(const at::Tensor&, std::optional<at::Device>) { return false; }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Operators with one form for all devices that looks up a kernel of the device's own.
  for (const char* name : {"copy_", "convolution", "convolution_backward", "_fused_sgd_", "_fused_adam_", "_fused_adamw_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_));
  m.impl("set_.source_Storage", TORCH_FN(set_whole));
  m.impl("is_pinned", TORCH_FN(is_pinned));
}

}  // namespace

// Under the name by which ATen looks for them.
namespace at {
using CUDAHooks = ::Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// For Python, through ctypes --------------------------------------------------------------------------------------------

extern "C" {
void card_set_count(int count) { cards = count; }
int card_current() { return current_card; }
void card_set_current(int card) { current_card = static_cast<c10::DeviceIndex>(card); }
int64_t card_stream(int card) { return current_streams[card]; }
void card_set_stream(int card, int64_t stream) { current_streams[card] = stream; }
int64_t card_allocated(int card) { return allocated[card]; }
int64_t card_peak(int card) { return peak[card]; }
void card_reset_peak(int card) { peak[card] = allocated[card].load(); }
int64_t card_counter(int which) { return counters[which]; }
void card_count(int which) { counters[which]++; }
// 0, or 1 where the host must not wait now.
int card_host_waits(int break_capture) {
  counters[HOST_WAITS]++;
  if (capture.graph != nullptr && break_capture) capture.broken = true;
  return capture.graph != nullptr;
}
void* card_graph_new() { return new Graph; }
void card_graph_free(void* graph) { delete static_cast<Graph*>(graph); }
int64_t card_graph_size(void* graph) { return static_cast<int64_t>(static_cast<Graph*>(graph)->work.size()); }
void card_capture_begin(void* graph) {
  capture = {static_cast<Graph*>(graph), current_streams[current_card], current_card, false};
}
// 1 where something during the capture was not allowed.
int card_capture_end() {
  Graph* graph = capture.graph;
  const bool broken = capture.broken;
  capture = {};
  if (graph == nullptr) return 1;
  c10::InferenceMode mode;
  for (const at::Tensor& t : graph->made)
    if (t.is_floating_point() && t.is_non_overlapping_and_dense()) {
      at::AutoDispatchBelowADInplaceOrView below;
      t.fill_(std::numeric_limits<double>::quiet_NaN());
    }
  graph->made.clear();
  return broken;
}
int card_capturing() { return captures_here(); }
// `work(id)` runs now by its caller, and again at every replay if this is a capture; 1 where it is one.
int card_capture_call(void (*work)(int64_t), int64_t id) {
  if (!captures_here()) return 0;
  capture.graph->work.push_back([work, id] { work(id); });
  return 1;
}
void card_replay(void* graph) {
  for (const auto& work : static_cast<Graph*>(graph)->work) work();
}
}
