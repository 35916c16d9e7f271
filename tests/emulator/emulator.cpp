#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include "cuda/chain/hardware.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>

namespace emulator {
namespace {
constexpr int STACK_BYTES = 64 * 1024;
constexpr int GRANULE = 4;  // bytes of shared memory tracked together; no access is narrower

enum class Operation { NONE, LOAD_MATRIX, MULTIPLY, SYNC_WARP };

struct Copy {
    int offset, bytes;
    unsigned char data[16];
};

struct Fiber {
    jmp_buf context;
    ucontext_t entry;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    int thread = 0;
    bool started = false, done = false;
    const char* waits_for = nullptr;
    Where where;
    std::vector<Copy> open_copies;             // not committed
    std::deque<std::vector<Copy>> copy_groups;  // committed, oldest first
};

// One warp-wide instruction while its lanes arrive.
struct Rendezvous {
    Operation operation = Operation::NONE;
    Where where;
    uint32_t arrived = 0;
    SharedPtr row[32];
    FragmentA* loaded[32];
    Accumulator* c[32];
    const FragmentA* a[32];
    const FragmentB* b[32];
    int columns = 0;
    res2net_fused::chain::DataType type{};
};

// What is known of GRANULE bytes of shared memory. Epochs count barriers over the whole launch, so an epoch before
// the CTA's first means "not in this CTA". Two accesses by different threads, one of them a write, need a barrier
// between them: of the CTA, or of the warp if both threads are in one.
struct Granule {
    uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
    int16_t writer = -1, reader = -1;
    bool several_lanes = false, several_warps = false;  // read in read_epoch
    bool in_flight = false;                             // the destination of an unfinished copy
    uint32_t write_line = 0, read_line = 0;
};

Launch launch;
Report report;
const std::function<void()>* kernel;
uint64_t random_state;
int stickiness;  // of 256: chance to stay with the warp that ran last
int last_warp;

std::vector<Fiber> fibers;
std::vector<Rendezvous> rendezvous;     // per warp
std::vector<uint32_t> ready;            // per warp: lanes that can run
std::vector<uint32_t> warp_epoch;       // per warp
std::vector<Granule> granules;
std::vector<unsigned char> memory;      // the CTA's shared memory
std::vector<std::vector<int>> writers;  // per buffer and GRANULE bytes: the thread of the launch that wrote it
Fiber* current;
jmp_buf scheduler;
int cta, cta_arrived, done_count;
uint32_t epoch, first_epoch;

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

template <class... Values> void finding(Kind kind, const Where& where, const char* format, Values... values) {
    if (report.count[kind]++ > 0) return;
    char text[400], line[600];
    std::snprintf(text, sizeof text, format, values...);
    const char* file = std::strrchr(where.file_name(), '/');
    std::snprintf(line, sizeof line, "%s:%u: thread %d of block %d: %s", file ? file + 1 : where.file_name(),
                  unsigned(where.line()), current->thread, cta, text);
    report.first[kind] = line;
}

// ---- fibers ----

void enter() {
    (*kernel)();
    bool in_flight = !current->open_copies.empty();
    for (const auto& group : current->copy_groups) in_flight |= !group.empty();
    if (in_flight) finding(IN_FLIGHT, current->where, "ends with copies in flight (last seen here)");
    current->done = true;
    done_count++;
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
    uint32_t warps = 0;
    for (size_t warp = 0; warp < ready.size(); warp++) warps |= uint32_t(ready[warp] != 0) << warp;
    if (!warps) return nullptr;
    const bool stay = ready[last_warp] && int(random_bits() % 256) < stickiness;
    if (!stay) last_warp = random_bit_of(warps);
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

// Gives up this CTA: its threads can no longer agree.
[[noreturn]] void abandon() { _longjmp(scheduler, 2); }

void run_cta() {
    current = nullptr;
    first_epoch = ++epoch;
    cta_arrived = done_count = 0;
    std::fill(memory.begin(), memory.end(), 0xff);  // NaN as bf16 and as float
    for (Granule& granule : granules) granule.in_flight = false;
    for (size_t warp = 0; warp < ready.size(); warp++) {
        ready[warp] = ~0u;
        rendezvous[warp].arrived = 0;
    }
    for (Fiber& fiber : fibers) {
        fiber.started = fiber.done = false;
        fiber.open_copies.clear();
        fiber.copy_groups.clear();
        getcontext(&fiber.entry);
        const int stagger = fiber.thread % 61 * 576;  // else all stacks share the same few cache sets
        fiber.entry.uc_stack.ss_sp = fiber.stack.get();
        fiber.entry.uc_stack.ss_size = STACK_BYTES - stagger;
        fiber.entry.uc_link = nullptr;
        makecontext(&fiber.entry, enter, 0);
    }
    if (_setjmp(scheduler) == 2) return;
    if (Fiber* next = pick()) resume(*next);
    if (done_count == int(fibers.size())) return;
    for (Fiber& fiber : fibers) {
        if (fiber.done) continue;
        current = &fiber;
        finding(DIVERGENCE, fiber.where, "waits for ever in %s; %d of %d threads have ended", fiber.waits_for, done_count,
                int(fibers.size()));
    }
}

// ---- memory ----

bool in_region(SharedPtr pointer, int bytes, const char* what, const Where& where) {
    bool good = true;
    if (pointer.offset < pointer.begin || pointer.offset + bytes > pointer.end || pointer.end > int(memory.size())) {
        finding(OUT_OF_BOUNDS, where, "%s of %d bytes at byte %d of %s, which has %d", what, bytes, pointer.offset - pointer.begin,
                pointer.region, pointer.end - pointer.begin);
        good = false;
    }
    if (pointer.offset % bytes) {
        finding(MISALIGNED, where, "%s of %d bytes at byte %d of shared memory", what, bytes, pointer.offset);
        good = false;
    }
    return good;
}

bool ordered(int left, int right, uint32_t left_warp_epoch) {
    return left == right || (left / 32 == right / 32 && left_warp_epoch < warp_epoch[right / 32]);
}

void check_read(int thread, SharedPtr from, int bytes, const Where& where) {
    for (int at = from.offset; at < from.offset + bytes; at += GRANULE) {
        Granule& granule = granules[at / GRANULE];
        const int place = at - from.begin;
        if (granule.in_flight)
            finding(IN_FLIGHT, where, "reads byte %d of %s before the copy of line %u was waited for", place, from.region, granule.write_line);
        else if (granule.write_epoch < first_epoch)
            finding(UNINITIALISED, where, "reads byte %d of %s, which nobody wrote", place, from.region);
        else if (granule.write_epoch == epoch && !ordered(granule.writer, thread, granule.write_warp_epoch))
            finding(RACE, where, "reads byte %d of %s, written by thread %d in line %u with no barrier between", place, from.region,
                    int(granule.writer), granule.write_line);
        if (granule.read_epoch != epoch) {
            granule.read_epoch = epoch;
            granule.several_lanes = granule.several_warps = false;
        } else if (granule.reader != thread) {
            (granule.reader / 32 == thread / 32 ? granule.several_lanes : granule.several_warps) = true;
        }
        granule.reader = int16_t(thread);
        granule.read_warp_epoch = warp_epoch[thread / 32];
        granule.read_line = where.line();
    }
}

void check_write(int thread, SharedPtr to, int bytes, const Where& where) {
    for (int at = to.offset; at < to.offset + bytes; at += GRANULE) {
        Granule& granule = granules[at / GRANULE];
        const int place = at - to.begin;
        if (granule.in_flight)
            finding(IN_FLIGHT, where, "writes byte %d of %s before the copy of line %u was waited for", place, to.region, granule.write_line);
        else if (granule.write_epoch == epoch && !ordered(granule.writer, thread, granule.write_warp_epoch))
            finding(RACE, where, "writes byte %d of %s, written by thread %d in line %u with no barrier between", place, to.region,
                    int(granule.writer), granule.write_line);
        else if (granule.read_epoch == epoch &&
                 (granule.several_warps || !ordered(granule.reader, thread, granule.read_warp_epoch) ||
                  (granule.several_lanes && granule.read_warp_epoch >= warp_epoch[thread / 32])))
            finding(RACE, where, "writes byte %d of %s, read by thread %d in line %u with no barrier between", place, to.region,
                    int(granule.reader), granule.read_line);
        granule.write_epoch = epoch;
        granule.write_warp_epoch = warp_epoch[thread / 32];
        granule.writer = int16_t(thread);
        granule.write_line = where.line();
    }
}

// The index of the buffer that holds these bytes, or -1.
int find_buffer(const void* address, int bytes, int alignment, const char* what, const Where& where) {
    const auto place = reinterpret_cast<uintptr_t>(address);
    if (place % alignment) {
        finding(MISALIGNED, where, "%s of %d bytes of global memory", what, alignment);
        return -1;
    }
    for (size_t i = 0; i < launch.buffers.size(); i++) {
        const auto begin = reinterpret_cast<uintptr_t>(launch.buffers[i].begin);
        if (place >= begin && place + bytes <= begin + launch.buffers[i].bytes) return int(i);
    }
    const Buffer* nearest = nullptr;
    int64_t nearest_offset = 0;
    for (const Buffer& buffer : launch.buffers) {
        const int64_t offset = int64_t(place - reinterpret_cast<uintptr_t>(buffer.begin));
        if (!nearest || std::llabs(offset) < std::llabs(nearest_offset)) nearest = &buffer, nearest_offset = offset;
    }
    finding(OUT_OF_BOUNDS, where, "%s of %d bytes outside every buffer, at byte %lld of %s", what, bytes, (long long)nearest_offset,
            nearest ? nearest->name : "nothing");
    return -1;
}

void finish_copies(std::vector<Copy>& copies) {
    const int thread = current->thread;
    for (const Copy& copy : copies) {
        std::memcpy(&memory[copy.offset], copy.data, copy.bytes);
        for (int at = copy.offset; launch.checks && at < copy.offset + copy.bytes; at += GRANULE) {
            Granule& granule = granules[at / GRANULE];
            granule.in_flight = false;
            granule.write_epoch = epoch;
            granule.write_warp_epoch = warp_epoch[thread / 32];
            granule.writer = int16_t(thread);
        }
    }
    copies.clear();
}

// ---- warp-wide instructions ----

void perform_load(Rendezvous& meeting, int warp) {
    uint16_t rows[4][8][8];
    for (int lane = 0; lane < 32; lane++) {
        const SharedPtr row = meeting.row[lane];
        uint16_t* to = rows[lane / 8][lane % 8];
        std::memset(to, 0xff, 16);
        current = &fibers[warp * 32 + lane];
        if (launch.checks) {
            if (!in_region(row, 16, "matrix load", meeting.where)) continue;
            check_read(current->thread, row, 16, meeting.where);
        }
        std::memcpy(to, &memory[row.offset], 16);
    }
    for (int matrix = 0; launch.checks && matrix < 4; matrix++) {
        int ways[8] = {};
        for (int i = 0; i < 8; i++) {
            const int place = meeting.row[matrix * 8 + i].offset;
            bool repeated = false;
            for (int other = 0; other < i; other++) repeated |= meeting.row[matrix * 8 + other].offset == place;
            if (!repeated) report.bank_ways = std::max(report.bank_ways, ++ways[place / 16 & 7]);
        }
    }
    for (int lane = 0; lane < 32; lane++)
        for (int matrix = 0; matrix < 4; matrix++) std::memcpy(&meeting.loaded[lane]->word[matrix], &rows[matrix][lane / 4][lane % 4 * 2], 4);
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
    if (meeting.type == res2net_fused::chain::TF32) return perform_multiply_tf32(meeting);
    const auto widen = meeting.type == res2net_fused::chain::BF16 ? +[](uint32_t bits) { return widen_bf16(bits); } : widen_fp16;
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
    const int warp = current->thread / 32;
    Rendezvous& meeting = rendezvous[warp];
    if (meeting.arrived == 0) {
        meeting.operation = operation;
        meeting.where = where;
    } else if (meeting.operation != operation || meeting.where.line() != where.line()) {
        finding(DIVERGENCE, where, "is here while other lanes of its warp are at the warp-wide instruction of line %u", unsigned(meeting.where.line()));
        abandon();
    }
    return meeting;
}

void meet(Rendezvous& meeting, const char* name, const Where& where) {
    Fiber* const self = current;
    const int warp = self->thread / 32;
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

Report run(const Launch& launch_, const std::function<void()>& kernel_) {
    launch = launch_;
    kernel = &kernel_;
    report = {};
    random_state = launch.seed * 0x9e3779b97f4a7c15u + 0x1234567;
    const int choices[3] = {0, 240, 256};  // warps in lock step, loosely, each as far as its next barrier
    stickiness = choices[launch.seed % 3];
    last_warp = 0;
    const int warps = launch.threads / 32;
    if (int(fibers.size()) != launch.threads) fibers = std::vector<Fiber>(launch.threads);
    for (int thread = 0; thread < launch.threads; thread++) fibers[thread].thread = thread;
    rendezvous.assign(warps, {});
    ready.assign(warps, 0);
    warp_epoch.assign(warps, 1);
    epoch = 0;
    granules.assign((launch.shared_bytes + GRANULE - 1) / GRANULE, {});
    memory.assign(launch.shared_bytes, 0);
    writers.assign(launch.buffers.size(), {});
    for (size_t i = 0; i < launch.buffers.size(); i++)
        if (launch.buffers[i].writable) writers[i].assign(launch.buffers[i].bytes / GRANULE + 1, -1);
    const int ctas = launch.blocks;
    std::vector<int> order(ctas);
    for (int i = 0; i < ctas; i++) {
        const int other = random_bits() % (i + 1);
        order[i] = order[other];
        order[other] = i;
    }
    for (int next : order) {
        cta = next;
        run_cta();
    }
    return report;
}

int thread_index() { return current->thread; }
int block_index() { return cta; }
SharedPtr shared_memory() { return {0, 0, launch.shared_bytes, "shared memory"}; }

void read_shared(SharedPtr from, void* to, int bytes, const Where& where) {
    if (launch.checks) {
        std::memset(to, 0xff, bytes);
        if (!in_region(from, bytes, "load", where)) return;
        check_read(current->thread, from, bytes, where);
    }
    std::memcpy(to, &memory[from.offset], bytes);
}

void write_shared(SharedPtr to, const void* from, int bytes, const Where& where) {
    if (launch.checks) {
        if (!in_region(to, bytes, "store", where)) return;
        check_write(current->thread, to, bytes, where);
    }
    std::memcpy(&memory[to.offset], from, bytes);
}

void read_global(const void* from, void* to, int bytes, const Where& where) {
    std::memset(to, 0xff, bytes);
    if (launch.checks && find_buffer(from, bytes, bytes, "load", where) < 0) return;
    std::memcpy(to, from, bytes);
}

void write_global(void* to, const void* from, int bytes, const Where& where) {
    if (launch.checks) {
        const int index = find_buffer(to, bytes, bytes, "store", where);
        if (index < 0) return;
        const Buffer& buffer = launch.buffers[index];
        if (!buffer.writable) {
            finding(OUT_OF_BOUNDS, where, "store to %s, which is read-only", buffer.name);
            return;
        }
        const auto offset = static_cast<const char*>(to) - static_cast<const char*>(buffer.begin);
        const int self = cta * launch.threads + current->thread;
        for (int at = int(offset / GRANULE); at < int((offset + bytes) / GRANULE); at++) {
            int& writer = writers[index][at];
            if (writer >= 0 && writer != self)
                finding(RACE, where, "stores byte %d of %s, which thread %d of block %d stored too", at * GRANULE, buffer.name,
                        writer % launch.threads, writer / launch.threads);
            writer = self;
        }
    }
    std::memcpy(to, from, bytes);
}

void start_copy(SharedPtr to, const void* from, int bytes, int valid, const Where& where) {
    Copy copy{to.offset, bytes, {}};
    if (launch.checks) {
        if (!in_region(to, bytes, "copy", where) || find_buffer(from, valid, bytes, "copy", where) < 0) return;
        check_write(current->thread, to, bytes, where);
        for (int at = to.offset; at < to.offset + bytes; at += GRANULE) granules[at / GRANULE].in_flight = true;
    }
    std::memcpy(copy.data, from, valid);  // zeros follow
    std::memset(&memory[to.offset], 0xff, bytes);  // the data arrives as late as it may
    current->open_copies.push_back(copy);
}

void commit_copies() {
    current->copy_groups.emplace_back();
    current->copy_groups.back().swap(current->open_copies);
}

void wait_copies(int pending) {
    while (int(current->copy_groups.size()) > pending) {
        finish_copies(current->copy_groups.front());
        current->copy_groups.pop_front();
    }
}

void sync_cta(const Where& where) {
    static uint32_t line;
    if (cta_arrived > 0 && line != where.line()) {
        finding(DIVERGENCE, where, "is at this barrier while others are at the one of line %u", line);
        abandon();
    }
    line = where.line();
    if (++cta_arrived < launch.threads) return block("a barrier", where);
    cta_arrived = 0;
    epoch++;
    for (uint32_t& lanes : ready) lanes = ~0u;
    ready[current->thread / 32] &= ~(1u << current->thread % 32);
}

void sync_warp(const Where& where) { meet(arrive(Operation::SYNC_WARP, where), "a warp barrier", where); }

void load_matrix(SharedPtr row, FragmentA* a, const Where& where) {
    Rendezvous& meeting = arrive(Operation::LOAD_MATRIX, where);
    const int lane = current->thread % 32;
    meeting.row[lane] = row;
    meeting.loaded[lane] = a;
    meet(meeting, "a matrix load", where);
}

void multiply(Accumulator* c, const FragmentA* a, const FragmentB* b, int columns, res2net_fused::chain::DataType type, const Where& where) {
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
