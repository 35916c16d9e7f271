// The stand-in for the CUDA runtime: cards of given limits, errors as the real runtime keeps them, a record of every launch.
#include "cuda_runtime_api.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "cuda/chain/hardware.h"

namespace {

constexpr int DEFAULT_SHARED = 48 << 10;  // dynamic shared memory that a kernel may have without asking for more
constexpr int MOST_THREADS = 1024, MOST_CLUSTER = 8;
constexpr unsigned MOST_BLOCKS = 0x7fffffff;

struct Card {  // as native.DeviceLimits begins
  int major, minor, multiprocessors, shared_per_block, shared_per_multiprocessor, registers_per_multiprocessor, l2;
  int code = -1;  // version of the PTX of the code that runs there, if not that of a default build
};
constexpr int CARD_NUMBERS = 7;
struct Record {  // as in cuda_library.py
  char symbol[256];
  int grid, block, shared_bytes, cluster, device, overlaps;
  int64_t stream;
};

std::mutex mutex;  // of all that follows but what a thread has for itself
std::vector<Card> cards;
std::map<std::pair<const void*, int>, int> shared_limits;  // of a kernel on a device
std::vector<Record> records;
std::vector<std::array<int64_t, 2>> limits_set;  // device and bytes of every call that set a limit
int next_failure = 0;
constexpr int NEW_DRIVER = 13000;
std::atomic<int> driver{NEW_DRIVER};
bool executes = false;
std::atomic<int> dead{0};  // the error that ended the context, after which every call gives it

thread_local int own_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

// Errors after which a real context is of no use.
const std::set<int> DEADLY{214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721};

cudaError_t ended(int error) {
  if (error == 0) error = dead;
  if (error != 0) last_error = cudaError_t(error);
  return cudaError_t(error);
}

// The card's, where one is in this process: torch, the guard of an operator and this runtime then agree on devices and streams.
const c10::impl::DeviceGuardImplInterface* guard() {
  return c10::impl::device_guard_impl_registry[size_t(c10::DeviceType::CUDA)].load();
}
int current_device() { return guard() != nullptr ? guard()->getDevice().index() : own_device; }
bool exists(int device) { return device >= 0 && size_t(device) < cards.size(); }

// What the default architectures of build_flags.py run as: sm_80 or sm_90a code, or code of or from compute_100.
int code_for(const Card& card) {
  if (card.code >= 0) return card.code;
  return card.major == 8 ? 80 : card.major == 9 ? 90 : 100;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, int device, int cluster, bool overlaps) {
  if (!exists(device)) return cudaErrorInvalidDevice;
  const int code = code_for(cards[device]);
  if (code == 0) return cudaErrorNoKernelImageForDevice;
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (grid.x < 1 || grid.x > MOST_BLOCKS || grid.y != 1 || grid.z != 1) return cudaErrorInvalidConfiguration;
  if (block.x < 1 || block.x > MOST_THREADS || block.y != 1 || block.z != 1) return cudaErrorInvalidConfiguration;
  const auto limit = shared_limits.find({kernel, device});
  const int most_shared = limit == shared_limits.end() ? DEFAULT_SHARED : limit->second;
  if (config.dynamicSmemBytes > size_t(most_shared)) return cudaErrorInvalidValue;
  // A real device runs such a kernel, which would read what is not there yet: code for older ones does not wait.
  if (overlaps && (cards[device].major < 9 || code < 90)) return cudaErrorNotSupported;
  if (cluster == 0) return cudaSuccess;
  if (cards[device].major < 9 || code < 90) return cudaErrorNotSupported;
  if (cluster < 1 || cluster > MOST_CLUSTER || grid.x % cluster != 0) return cudaErrorInvalidClusterSize;
  return cudaSuccess;
}

}  // namespace

namespace stand_in {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (dead) return ended(0);
  const std::lock_guard lock(mutex);
  const int device = current_device();
  if (!exists(device)) return ended(cudaErrorInvalidDevice);
  if (code_for(cards[device]) == 0) return ended(cudaErrorNoKernelImageForDevice);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > cards[device].shared_per_block)
    return ended(cudaErrorInvalidValue);
  shared_limits[{kernel, device}] = value;
  limits_set.push_back({device, value});
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (dead) return ended(0);
  const std::lock_guard lock(mutex);
  const int device = current_device();
  if (!exists(device)) return ended(cudaErrorInvalidDevice);
  const Card& card = cards[device];
  if (code_for(card) == 0) return ended(cudaErrorNoKernelImageForDevice);
  const auto limit = shared_limits.find({kernel, device});
  *attributes = {code_for(card), 10 * card.major + card.minor, limit == shared_limits.end() ? DEFAULT_SHARED : limit->second};
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
  if (dead) return ended(0);
  const std::lock_guard lock(mutex);  // of the emulator too, which runs one launch at a time
  const int device = current_device();
  int cluster = 0;
  bool overlaps = false;
  for (unsigned i = 0; i < config.numAttrs; i++) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = int(attribute.val.clusterDim.x);
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlaps = attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  if (const int failure = std::exchange(next_failure, 0)) {
    if (DEADLY.count(failure)) dead = failure;
    return ended(failure);
  }
  if (const cudaError_t error = check(config, kernel, device, cluster, overlaps)) return ended(error);
  Record record{};
  Dl_info info{};
  if (dladdr(kernel, &info) != 0 && info.dli_sname != nullptr)
    std::strncpy(record.symbol, info.dli_sname, sizeof record.symbol - 1);
  record.grid = int(config.gridDim.x), record.block = int(config.blockDim.x);
  record.shared_bytes = int(config.dynamicSmemBytes);
  record.cluster = std::max(1, cluster), record.device = device, record.stream = reinterpret_cast<int64_t>(config.stream);
  record.overlaps = overlaps;
  records.push_back(record);
  if (executes) {
    emulator::Launch emulated{record.grid, record.block, record.shared_bytes, 1, false, {}, record.cluster};
    emulator::run(emulated, body);
  }
  return cudaSuccess;
}

}  // namespace stand_in

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  if (dead) return ended(0);
  *device = current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (dead) return ended(0);
  const std::lock_guard lock(mutex);
  if (!exists(device)) return ended(cudaErrorInvalidDevice);
  if (guard() != nullptr) guard()->setDevice({c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)});
  own_device = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (dead) return ended(0);
  const std::lock_guard lock(mutex);
  if (!exists(device)) return ended(cudaErrorInvalidDevice);
  const Card& card = cards[device];
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = card.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = card.minor;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = card.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = card.shared_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = card.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = card.registers_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = card.l2;
      return cudaSuccess;
  }
  return ended(cudaErrorInvalidValue);
}
// A thread's last error stays through calls that succeed; one that ended the context stays whatever is called.
cudaError_t cudaPeekAtLastError() { return dead ? cudaError_t(dead.load()) : last_error; }
cudaError_t cudaGetLastError() { return dead ? cudaError_t(dead.load()) : std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  static const std::map<int, const char*> TEXTS{
      {0, "no error"},
      {1, "invalid argument"},
      {2, "out of memory"},
      {9, "invalid configuration argument"},
      {98, "invalid device function"},
      {101, "invalid device ordinal"},
      {209, "no kernel image is available for execution on the device"},
      {700, "an illegal memory access was encountered"},
      {701, "too many resources requested for launch"},
      {715, "an illegal instruction was encountered"},
      {719, "unspecified launch failure"},
      {801, "operation not supported"},
      {912, "cluster misconfiguration"},
  };
  const auto found = TEXTS.find(error);
  return found == TEXTS.end() ? "unrecognized error code" : found->second;
}

// In libtorch_cuda where torch has CUDA. 0: AOTI_TORCH_SUCCESS
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = nullptr;
  if (guard() == nullptr) return 0;
  const c10::Device on(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
  *stream = reinterpret_cast<void*>(guard()->getStream(on).id());
  return 0;
}

// For cuda_library.py -----------------------------------------------------------------------------------------------------

void stand_in_set_cards(const int* numbers, int count) {
  const std::lock_guard lock(mutex);
  cards.assign(count, {});
  for (int i = 0; i < count; i++) std::memcpy(&cards[i], numbers + CARD_NUMBERS * i, CARD_NUMBERS * sizeof(int));
}
void stand_in_clear() {
  const std::lock_guard lock(mutex);
  records.clear(), limits_set.clear();
  next_failure = 0, dead = 0, executes = false, driver = NEW_DRIVER;
  last_error = cudaSuccess;
}
int stand_in_launches() {
  const std::lock_guard lock(mutex);
  return int(records.size());
}
void stand_in_launch(int index, Record* record) {
  const std::lock_guard lock(mutex);
  *record = records.at(index);
}
int stand_in_limits_set(int64_t* numbers, int most) {  // two numbers each
  const std::lock_guard lock(mutex);
  for (int i = 0; i < std::min<int>(most, int(limits_set.size())); i++) std::copy_n(limits_set[i].begin(), 2, numbers + 2 * i);
  return int(limits_set.size());
}
void stand_in_plant_stale_error(int code) { last_error = cudaError_t(code); }
void stand_in_fail_next_launch(int code) {
  const std::lock_guard lock(mutex);
  next_failure = code;
}
void stand_in_driver(int version) { driver = version; }
void stand_in_load_code(int device, int version) {
  const std::lock_guard lock(mutex);
  cards.at(device).code = version;
}
void stand_in_execute(int on) {
  const std::lock_guard lock(mutex);
  executes = on != 0;
}
}
