#include "cpu/runtime/scratch.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

namespace res2net_fused {
namespace {

constexpr size_t kCacheLimit = size_t{128} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

struct CachedBlock {
  float* data;
  size_t bytes;
};

// Blocks nobody uses, least recently used first.
class Cache {
 public:
  // The smallest block that fits without wasting more than it gives, or a null one.
  CachedBlock take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); i++) {
      const bool fits = blocks_[i].bytes >= bytes && blocks_[i].bytes / 4 <= bytes;
      if (fits && (best == blocks_.size() || blocks_[i].bytes < blocks_[best].bytes)) best = i;
    }
    if (best == blocks_.size()) return {nullptr, 0};
    const CachedBlock found = blocks_[best];
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(best));
    held_ -= found.bytes;
    return found;
  }

  void give(CachedBlock block) {
    std::unique_lock<std::mutex> lock(mutex_);
    blocks_.push_back(block);
    held_ += block.bytes;
    shrink(kCacheLimit, lock);
  }

  // Around a fork: the child must not inherit a lock held by a thread that it does not have.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  int64_t held(bool release) {
    std::unique_lock<std::mutex> lock(mutex_);
    const size_t left = release ? 0 : held_;
    if (release) shrink(0, lock);
    return static_cast<int64_t>(left);
  }

 private:
  // Unlocks before it frees: giving pages back takes long, and other calls wait meanwhile.
  void shrink(size_t limit, std::unique_lock<std::mutex>& lock) {
    auto last = blocks_.begin();
    for (; held_ > limit; last++) held_ -= last->bytes;
    const std::vector<CachedBlock> freed(blocks_.begin(), last);
    blocks_.erase(blocks_.begin(), last);
    lock.unlock();
    for (const CachedBlock& block : freed) std::free(block.data);
  }

  std::mutex mutex_;
  std::vector<CachedBlock> blocks_;
  size_t held_ = 0;
};

Cache& cache() {
  static Cache* const instance = new Cache;  // never destroyed: threads may outlive static objects
  return *instance;
}

[[maybe_unused]] const int watches_forks =
    pthread_atfork([] { cache().lock(); }, [] { cache().unlock(); }, [] { cache().unlock(); });

CachedBlock allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 4096;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* data = std::aligned_alloc(alignment, bytes);
  if (data == nullptr) throw std::bad_alloc();
  ask_for_huge_pages(data, static_cast<int64_t>(bytes));
  return {static_cast<float*>(data), bytes};
}

}  // namespace

Scratch::Scratch(int64_t floats) : data_(nullptr), bytes_(0) {
  if (floats == 0) return;
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  CachedBlock block = cache().take(bytes);
  if (block.data == nullptr) block = allocate(bytes);
  data_ = block.data;
  bytes_ = block.bytes;
  const char* poison = std::getenv("RES2NET_FUSED_CPU_POISON");
  if (poison != nullptr && std::strcmp(poison, "1") == 0) {
    for (size_t i = 0; i < bytes_ / sizeof(float); i++) data_[i] = std::numeric_limits<float>::quiet_NaN();
  }
}

Scratch::~Scratch() {
  if (data_ != nullptr) cache().give({data_, bytes_});
}

void ask_for_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // no matter if refused
#endif
}

int64_t cached_scratch_bytes(bool release) { return cache().held(release); }

}  // namespace res2net_fused
