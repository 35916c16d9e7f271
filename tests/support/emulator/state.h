// What the parts of the emulator share: the CTAs of the cluster that runs, their threads, and what is known of memory.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include "cuda/chain/hardware.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

namespace emulator {
constexpr int GRANULE = 4;  // bytes of shared memory tracked together; no access is narrower

struct Copy {
  int offset, bytes;
  unsigned char data[16];
};

// A barrier in shared memory at which bulk copies and stores of other CTAs arrive. They land as late as they may: when somebody
// waits for them.
struct Arrival {
  struct Copy {
    int offset;
    std::vector<unsigned char> data;
    int sender;      // CTA of the cluster
    uint32_t epoch;  // of the sender then
  };
  int threads = 1;               // that arrive in each phase
  int arrived = 0;               // of them, in the present phase
  int expected = 0, issued = 0;  // bytes
  int phase = 0;
  uint64_t number = 0;                       // of the last phase that ended, counted over the whole launch
  std::vector<uint32_t> known;               // of that phase, by CTA
  std::vector<uint64_t> finished, arriving;  // products that came before its end, by warp: see Fiber; of the present phase
  std::vector<Copy> copies;
  std::vector<struct Fiber*> waiting;
};

// What is known of GRANULE bytes of shared memory. Epochs count barriers of CTAs over the whole launch, so an epoch before
// the cluster's first means "not in this cluster". Two accesses by different threads, one of them a write, need a barrier
// between them: of the CTA, or of the warp if both threads are in one, or else of the cluster. Threads are the cluster's.
struct Granule {
  uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
  int write_phase = 0, read_phase = 0;  // barriers of the cluster at which the thread (of the reads: any) had arrived before
  int16_t writer = -1, reader = -1;
  bool several_lanes = false, several_warps = false;  // read in read_epoch
  bool by_products = false;                           // all of these reads
  uint64_t products[4] = {};                          // by warpgroup of the CTA: the last product that reads it
  bool in_flight = false;                             // the destination of an unfinished copy
  uint32_t write_line = 0, read_line = 0;
  uint64_t write_number = 0;  // counts all writes of the launch
  // Written by a bulk copy: of the phase that brought it, which a thread may have waited for itself, and of its barrier.
  uint64_t phase_number = 0;
  int arrival = 0;
};

struct Cta {
  int block = 0;
  int arrived = 0, done = 0;  // threads at the CTA's barrier, threads that have ended
  uint32_t line = 0;          // of that barrier
  uint32_t epoch = 0;
  std::vector<unsigned char> memory;
  std::vector<Granule> granules;
  std::map<int, Arrival> arrivals;  // by their places
};

struct Fiber {
  jmp_buf context;
  ucontext_t entry;
  std::unique_ptr<char[]> stack;
  int rank = 0, thread = 0;  // CTA of the cluster, thread of the CTA
  int number = 0, warp = 0;  // of the cluster
  bool started = false, done = false;
  uint64_t shown = 0;              // write_number at its last proxy fence
  int arrivals = 0, waits = 0;     // at and for barriers of the cluster
  bool awaited = false;            // the kernel before
  bool let_begin = false;          // the next kernel
  std::map<int, uint64_t> phases;  // by arrival: the last one waited for
  std::vector<uint32_t> known;     // by CTA: what it did before this epoch of its own came before what arrived from it
  std::vector<uint64_t> finished;  // by warp of the CTA: all its products up to this number came before what this thread does
  const char* waits_for = nullptr;
  Where where;
  std::vector<Copy> open_copies;              // not committed
  std::deque<std::vector<Copy>> copy_groups;  // committed, oldest first
};

// The thread that wrote each GRANULE bytes of a buffer, or -1. Kept in pages, since buffers may be large and sparse.
class Writers {
 public:
  int& of(int64_t granule) {
    std::vector<int>& page = pages_[granule / PAGE];
    if (page.empty()) page.assign(PAGE, -1);
    return page[granule % PAGE];
  }

 private:
  static constexpr int64_t PAGE = 1024;
  std::unordered_map<int64_t, std::vector<int>> pages_;
};

extern Launch launch;
extern Report report;
extern std::vector<Cta> ctas;  // of the cluster that runs
extern std::vector<Fiber> fibers;
extern std::vector<uint32_t> warp_epoch;  // per warp of the cluster
extern std::vector<Writers> writers;      // per buffer
extern Fiber* current;
extern uint32_t first_epoch;
extern uint64_t write_number;

template <class... Values>
void finding(Kind kind, const Where& where, const char* format, Values... values) {
  if (report.count[kind]++ > 0) return;
  char text[400], line[600];
  std::snprintf(text, sizeof text, format, values...);
  const char* file = std::strrchr(where.file_name(), '/');
  std::snprintf(
      line, sizeof line, "%s:%u: thread %d of block %d: %s", file ? file + 1 : where.file_name(), unsigned(where.line()),
      current->thread, ctas[current->rank].block, text);
  report.first[kind] = line;
}

// Defined in emulator.cpp. All but `wake` concern the current thread.
void suspend(const char* waits_for, const Where& where);
void wake(const Fiber& fiber);
[[noreturn]] void give_up();  // gives up this cluster

// Defined in products.cpp.
bool products_pending();  // of the current thread's warpgroup
void prepare_products();

// Defined in memory.cpp. They concern the current thread and the shared memory of its CTA, stores to others excepted.
bool in_region(SharedPtr pointer, int bytes, const char* what, const Where& where);
bool shown(const Granule& granule);                                                    // to the async proxy
void check_read(SharedPtr from, int bytes, const Where& where, uint64_t product = 0);  // product: that reads, if one does
void prepare_memory();
void check_end();  // once all threads of the cluster have ended
}  // namespace emulator
