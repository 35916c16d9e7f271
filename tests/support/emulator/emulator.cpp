#include "state.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace emulator {
Launch launch;
Report report;
std::vector<Cta> ctas;
std::vector<Fiber> fibers;
std::vector<uint32_t> warp_epoch;
Fiber* current;
uint32_t first_epoch;

namespace {
constexpr int STACK_BYTES = 64 * 1024;

enum class Operation { NONE, LOAD_MATRIX, MULTIPLY, SYNC_WARP };

// One warp-wide instruction while its lanes arrive.
struct Rendezvous {
  Operation operation = Operation::NONE;
  Where where;
  uint32_t arrived = 0;
  SharedPtr row[32];
  uint32_t* loaded[32];
  int matrices = 0;  // of 8 x 16 bytes that a load reads
  Accumulator* c[32];
  const FragmentA* a[32];
  const FragmentB* b[32];
  int columns = 0;
  res2net_fused::cuda::DataType type{};
};

const std::function<void()>* kernel;
uint64_t random_state;
int stickiness;  // of 256: chance to stay with the warp that ran last
int last_warp;

std::vector<Rendezvous> rendezvous;  // per warp of the cluster
std::vector<uint32_t> ready;         // per warp: lanes that can run
jmp_buf scheduler;
uint32_t epoch;
int cluster_arrived, cluster_phase;  // threads at the cluster's barrier, barriers that all have arrived at
uint32_t cluster_line;               // of the arrival
std::vector<Fiber*> waiting_for_phase;

uint32_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 24);
}

int random_bit_of(uint32_t mask) {
  const int start = random_bits() % 32;
  return (std::countr_zero(std::rotr(mask, start)) + start) % 32;
}

// ---- fibers ----

void enter() {
  (*kernel)();
  bool in_flight = !current->open_copies.empty();
  for (const auto& group : current->copy_groups) in_flight |= !group.empty();
  if (current->arrivals != current->waits)
    finding(DIVERGENCE, current->where, "ends without waiting for the cluster's barrier (last seen here)");
  if (in_flight) finding(IN_FLIGHT, current->where, "ends with copies in flight (last seen here)");
  if (products_pending()) finding(IN_FLIGHT, current->where, "ends with products in flight (last seen here)");
  // Else this kernel could end before the one before it, and the next one would take both for ended.
  if (launch.overlaps && !current->awaited)
    finding(PREDECESSOR, current->where, "ends without waiting for the kernel before (last seen here)");
  if (launch.overlaps && !current->let_begin)
    finding(PREDECESSOR, current->where, "ends without letting the next kernel begin (last seen here)");
  current->done = true;
  ctas[current->rank].done++;
  _longjmp(scheduler, 1);
}

[[noreturn]] void resume(Fiber& fiber) {
  current = &fiber;
  report.switches++;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
  std::abort();
}

Fiber* pick() {
  const bool stay = ready[last_warp] && int(random_bits() % 256) < stickiness;
  if (!stay) {
    const int warps = int(ready.size()), start = int(random_bits() % warps);
    int skipped = 0;
    while (skipped < warps && !ready[(start + skipped) % warps]) skipped++;
    if (skipped == warps) return nullptr;
    last_warp = (start + skipped) % warps;
  }
  const int lane = random_bit_of(ready[last_warp]);
  ready[last_warp] &= ~(1u << lane);
  return &fibers[last_warp * 32 + lane];
}

[[gnu::noinline]] void block(const char* waits_for, const Where& where) {
  current->waits_for = waits_for;
  current->where = where;
  if (_setjmp(current->context)) return;
  Fiber* next = pick();
  if (!next) _longjmp(scheduler, 1);
  resume(*next);
}

// Gives up this cluster: its threads can no longer agree.
[[noreturn]] void abandon() { _longjmp(scheduler, 2); }

int done_count() {
  int done = 0;
  for (const Cta& cta : ctas) done += cta.done;
  return done;
}

void run_cluster(int first_block) {
  current = nullptr;
  first_epoch = epoch + 1;
  cluster_arrived = cluster_phase = 0;
  waiting_for_phase.clear();
  prepare_products();
  for (Cta& cta : ctas) {
    cta.block = first_block++;
    cta.epoch = ++epoch;
    cta.arrived = cta.done = 0;
    cta.arrivals.clear();
    std::fill(cta.memory.begin(), cta.memory.end(), 0xff);  // NaN as bf16 and as float
    for (Granule& granule : cta.granules) granule.in_flight = false;
  }
  for (size_t warp = 0; warp < ready.size(); warp++) {
    ready[warp] = ~0u;
    rendezvous[warp].arrived = 0;
  }
  for (Fiber& fiber : fibers) {
    fiber.started = fiber.done = false;
    fiber.arrivals = fiber.waits = 0;
    fiber.shown = 0;
    fiber.phases.clear();
    fiber.known.assign(ctas.size(), 0);
    fiber.awaited = !launch.overlaps, fiber.let_begin = false;
    fiber.open_copies.clear();
    fiber.copy_groups.clear();
    getcontext(&fiber.entry);
    const int stagger = fiber.number % 61 * 576;  // else all stacks share the same few cache sets
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = STACK_BYTES - stagger;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, enter, 0);
  }
  if (_setjmp(scheduler) == 2) return;
  if (Fiber* next = pick()) resume(*next);
  if (done_count() == int(fibers.size())) return check_end();
  for (Fiber& fiber : fibers) {
    if (fiber.done) continue;
    current = &fiber;
    finding(
        DIVERGENCE, fiber.where, "waits for ever in %s; %d of %d threads have ended", fiber.waits_for, done_count(),
        int(fibers.size()));
  }
}

// ---- warp-wide instructions ----

void perform_load(Rendezvous& meeting, int warp) {
  uint16_t rows[4][8][8];
  for (int lane = 0; lane < 8 * meeting.matrices; lane++) {
    const SharedPtr row = meeting.row[lane];
    uint16_t* to = rows[lane / 8][lane % 8];
    std::memset(to, 0xff, 16);
    current = &fibers[warp * 32 + lane];
    if (launch.checks) {
      if (!in_region(row, 16, "matrix load", meeting.where)) continue;
      check_read(row, 16, meeting.where);
    }
    std::memcpy(to, &ctas[current->rank].memory[row.offset], 16);
  }
  for (int matrix = 0; launch.checks && matrix < meeting.matrices; matrix++) {
    int ways[8] = {};
    for (int i = 0; i < 8; i++) {
      const int place = meeting.row[matrix * 8 + i].offset;
      bool repeated = false;
      for (int other = 0; other < i; other++) repeated |= meeting.row[matrix * 8 + other].offset == place;
      if (!repeated) report.bank_ways = std::max(report.bank_ways, ++ways[place / 16 & 7]);
    }
  }
  for (int lane = 0; lane < 32; lane++)
    for (int matrix = 0; matrix < meeting.matrices; matrix++)
      std::memcpy(&meeting.loaded[lane][matrix], &rows[matrix][lane / 4][lane % 4 * 2], 4);
}

// m16n8k8 on TF32, which is fp32 without the lowest 13 bits.
void perform_multiply_tf32(Rendezvous& meeting) {
  const auto widen = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000); };
  float a[16][8];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = widen(meeting.a[lane]->word[i]);
  for (int j = 0; j < meeting.columns; j++) {
    float b[8][8], c[16][8];
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 2; i++) b[lane % 4 + i * 4][lane / 4] = widen(meeting.b[lane][j].word[i]);
      for (int i = 0; i < 4; i++) c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = meeting.c[lane][j].value[i];
    }
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < 8; k++)
        for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) meeting.c[lane][j].value[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

void perform_multiply(Rendezvous& meeting) {
  report.multiplies += meeting.columns;
  if (meeting.type == res2net_fused::cuda::TF32) return perform_multiply_tf32(meeting);
  const auto widen = meeting.type == res2net_fused::cuda::BF16 ? +[](uint32_t bits) { return widen_bf16(bits); } : widen_fp16;
  float a[16][16];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const uint32_t pair = meeting.a[lane]->word[i];
      const int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
      a[row][column] = widen(pair & 0xffff);
      a[row][column + 1] = widen(pair >> 16);
    }
  for (int j = 0; j < meeting.columns; j++) {
    float b[16][8], c[16][8];
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 2; i++) {
        const uint32_t pair = meeting.b[lane][j].word[i];
        b[lane % 4 * 2 + i * 8][lane / 4] = widen(pair & 0xffff);
        b[lane % 4 * 2 + i * 8 + 1][lane / 4] = widen(pair >> 16);
      }
      for (int i = 0; i < 4; i++) c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = meeting.c[lane][j].value[i];
    }
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < 16; k++)
        for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) meeting.c[lane][j].value[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

// Every lane of the warp has to arrive, at the same statement; the last one performs the instruction for all.
Rendezvous& arrive(Operation operation, const Where& where) {
  const int warp = current->warp;
  Rendezvous& meeting = rendezvous[warp];
  if (meeting.arrived == 0) {
    meeting.operation = operation;
    meeting.where = where;
  } else if (meeting.operation != operation || meeting.where.line() != where.line()) {
    finding(
        DIVERGENCE, where, "is here while other lanes of its warp are at the warp-wide instruction of line %u",
        unsigned(meeting.where.line()));
    abandon();
  }
  return meeting;
}

void meet(Rendezvous& meeting, const char* name, const Where& where) {
  Fiber* const self = current;
  const int warp = self->warp;
  meeting.arrived |= 1u << self->thread % 32;
  if (meeting.arrived != ~0u) return block(name, where);
  meeting.arrived = 0;
  if (meeting.operation == Operation::LOAD_MATRIX) perform_load(meeting, warp);
  if (meeting.operation == Operation::MULTIPLY) perform_multiply(meeting);
  if (meeting.operation == Operation::SYNC_WARP) warp_epoch[warp]++;
  current = self;
  ready[warp] |= ~(1u << self->thread % 32);
}
}  // namespace

void suspend(const char* waits_for, const Where& where) { block(waits_for, where); }
void wake(const Fiber& fiber) { ready[fiber.warp] |= 1u << fiber.thread % 32; }
void give_up() { abandon(); }

Report run(const Launch& launch_, const std::function<void()>& kernel_) {
  launch = launch_;
  kernel = &kernel_;
  report = {};
  random_state = launch.seed * 0x9e3779b97f4a7c15u + 0x1234567;
  const int choices[3] = {0, 240, 256};  // warps in lock step, loosely, each as far as its next barrier
  stickiness = choices[launch.seed % 3];
  last_warp = 0;
  const int threads = launch.cluster * launch.threads, warps = threads / 32;
  if (int(fibers.size()) != threads) fibers = std::vector<Fiber>(threads);
  for (int number = 0; number < threads; number++) {
    Fiber& fiber = fibers[number];
    fiber.rank = number / launch.threads, fiber.thread = number % launch.threads;
    fiber.number = number, fiber.warp = number / 32;
    if (!fiber.stack) fiber.stack.reset(new char[STACK_BYTES]);
  }
  rendezvous.assign(warps, {});
  ready.assign(warps, 0);
  warp_epoch.assign(warps, 1);
  epoch = 0;
  prepare_memory();
  const int clusters = launch.blocks / launch.cluster;
  if (clusters * launch.cluster != launch.blocks) std::abort();  // the driver refuses such a grid
  std::vector<int> order(clusters);
  for (int i = 0; i < clusters; i++) {
    const int other = random_bits() % (i + 1);
    order[i] = order[other];
    order[other] = i;
  }
  for (int next : order) run_cluster(next * launch.cluster);
  return report;
}

int thread_index() { return current->thread; }
int block_index() { return ctas[current->rank].block; }
SharedPtr shared_memory() { return {0, 0, launch.shared_bytes, "shared memory"}; }

void sync_cta(const Where& where) {
  Cta& cta = ctas[current->rank];
  if (cta.arrived > 0 && cta.line != where.line()) {
    finding(DIVERGENCE, where, "is at this barrier while others are at the one of line %u", cta.line);
    abandon();
  }
  cta.line = where.line();
  if (++cta.arrived < launch.threads) return block("a barrier", where);
  cta.arrived = 0;
  cta.epoch = ++epoch;
  const int warps = launch.threads / 32;
  for (int warp = 0; warp < warps; warp++) ready[current->rank * warps + warp] = ~0u;
  ready[current->warp] &= ~(1u << current->thread % 32);
}

void cluster_arrive(const Where& where) {
  if (current->arrivals != current->waits || (cluster_arrived > 0 && cluster_line != where.line())) {
    finding(DIVERGENCE, where, "arrives at the cluster's barrier a second time, or while others do in line %u", cluster_line);
    abandon();
  }
  current->where = where;
  current->arrivals++;
  cluster_line = where.line();
  if (++cluster_arrived < int(fibers.size())) return;
  cluster_arrived = 0;
  cluster_phase++;
  for (const Fiber* fiber : waiting_for_phase) ready[fiber->warp] |= 1u << fiber->thread % 32;
  waiting_for_phase.clear();
}

void cluster_wait(const Where& where) {
  if (current->arrivals == current->waits) {
    finding(DIVERGENCE, where, "waits for the cluster's barrier without having arrived");
    abandon();
  }
  if (cluster_phase < current->arrivals) {
    waiting_for_phase.push_back(current);
    block("a barrier of the cluster", where);
  }
  current->waits++;
}

void predecessor_wait(const Where& where) {
  current->where = where;
  current->awaited = true;
}

void successor_begin(const Where& where) {
  if (!current->awaited) finding(PREDECESSOR, where, "lets the next kernel begin before the one before it has ended");
  current->where = where;
  current->let_begin = true;
}

void sync_warp(const Where& where) { meet(arrive(Operation::SYNC_WARP, where), "a warp barrier", where); }

void load_matrices(SharedPtr row, uint32_t* words, int matrices, const Where& where) {
  Rendezvous& meeting = arrive(Operation::LOAD_MATRIX, where);
  const int lane = current->thread % 32;
  meeting.row[lane] = row;
  meeting.loaded[lane] = words;
  meeting.matrices = matrices;
  meet(meeting, "a matrix load", where);
}

void multiply(
    Accumulator* c, const FragmentA* a, const FragmentB* b, int columns, res2net_fused::cuda::DataType type,
    const Where& where) {
  Rendezvous& meeting = arrive(Operation::MULTIPLY, where);
  const int lane = current->thread % 32;
  meeting.c[lane] = c;
  meeting.a[lane] = a;
  meeting.b[lane] = b;
  meeting.columns = columns;
  meeting.type = type;
  meet(meeting, "a matrix multiply", where);
}

uint16_t round_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// fp16 by arithmetic: rounding to a multiple of the last place's value, which fp32 represents exactly.
uint16_t round_to_fp16(float value) {
  const uint16_t sign = uint16_t(std::bit_cast<uint32_t>(value) >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;  // the midpoint between the largest number and the next power of two
  if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(size * 0x1p24f));
  const int exponent = std::ilogb(size);
  const int mantissa = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024 ... 2048
  return sign | uint16_t((exponent + 14) * 1024 + mantissa);
}

float widen_fp16(uint32_t bits) {
  const int exponent = int(bits >> 10 & 31), mantissa = int(bits & 1023);
  float size = exponent == 0 ? std::ldexp(float(mantissa), -24) : std::ldexp(float(1024 + mantissa), exponent - 25);
  if (exponent == 31) size = mantissa ? NAN : INFINITY;
  return bits & 0x8000 ? -size : size;
}
}  // namespace emulator
