// The host build of csrc/cuda/chain/hardware.h: every thread of a CTA, or of all CTAs of a cluster, is a fiber, picked in a
// seeded random order, and every access to shared or global memory, every barrier and every warp-wide instruction is checked.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

#define DEVICE inline
using Where = std::source_location;  // of the kernel's statement, for the reports

// A byte of shared memory and the bounds of the region it belongs to.
struct SharedPtr {
  int offset, begin, end;
  const char* region;
  SharedPtr operator+(int bytes) const { return {offset + bytes, begin, end, region}; }
  SharedPtr operator^(int bits) const { return {offset ^ bits, begin, end, region}; }
  SharedPtr swizzled(int mask) const { return *this ^ (offset >> 3 & mask); }
  SharedPtr part(int from, int size, const char* name) const {
    return {offset + from, offset + from, offset + from + size, name};
  }
};

namespace emulator {
enum Kind {
  OUT_OF_BOUNDS,
  MISALIGNED,
  UNINITIALISED,
  RACE,
  IN_FLIGHT,
  DIVERGENCE,
  LIFETIME,
  PROXY,
  PREDECESSOR,
  ARRIVAL,
  KINDS
};
inline constexpr const char* KIND_NAMES[KINDS] = {"out-of-bounds", "misaligned", "uninitialised", "race",        "in-flight",
                                                  "divergence",    "lifetime",   "proxy",         "predecessor", "arrival"};

struct Buffer {
  const char* name;
  const void* begin;
  size_t bytes;
  bool writable;
  bool predecessors = false;  // the kernel before may still write it, or need what is in it
};

struct Launch {
  int blocks, threads, shared_bytes;
  uint64_t seed;
  bool checks;  // false: only compute, for speed
  std::vector<Buffer> buffers;
  int cluster = 1;        // blocks that run together and reach each other's shared memory
  bool overlaps = false;  // it may begin while the kernel before it ends, whose writes each thread sees behind its own wait
};

struct Report {
  int64_t count[KINDS] = {};
  std::string first[KINDS];  // the first finding of each kind, in words
  int bank_ways = 1;         // worst bank conflict of a matrix load; 1: none
  int64_t multiplies = 0, switches = 0;
};

Report run(const Launch& launch, const std::function<void()>& kernel);

// What the functions of hardware.h do on the host.
int thread_index();
int block_index();
SharedPtr shared_memory();
void read_shared(SharedPtr from, void* to, int bytes, const Where& where);
void write_shared(SharedPtr to, const void* from, int bytes, const Where& where);
void read_global(const void* from, void* to, int bytes, const Where& where);
void write_global(void* to, const void* from, int bytes, const Where& where);
void start_copy(SharedPtr to, const void* from, int bytes, int valid, const Where& where);
void proxy_fence();
void arrival_init(SharedPtr arrival, int threads, const Where& where);
void arrival_signal(SharedPtr arrival, const Where& where);
void arrival_expect(SharedPtr arrival, int bytes, const Where& where);
void arrival_wait(SharedPtr arrival, int parity, const Where& where);
void copy_bulk(SharedPtr to, const void* from, int bytes, SharedPtr arrival, const Where& where);
void commit_copies();
void wait_copies(int pending);
void sync_cta(const Where& where);
void sync_warp(const Where& where);
void predecessor_wait(const Where& where);
void successor_begin(const Where& where);
void cluster_arrive(const Where& where);
void cluster_wait(const Where& where);
void remote_store(SharedPtr to, int rank, Bytes16 value, SharedPtr arrival, const Where& where);
void load_matrices(SharedPtr row, uint32_t* words, int matrices, const Where& where);
void multiply(
    Accumulator* c, const FragmentA* a, const FragmentB* b, int columns, res2net_fused::cuda::DataType type,
    const Where& where);
uint16_t round_to_bf16(float value);
uint16_t round_to_fp16(float value);
float widen_fp16(uint32_t bits);
inline float widen_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
}  // namespace emulator

inline SharedPtr shared_memory() { return emulator::shared_memory(); }
template <class T>
T kept(T value) {
  return value;
}
template <class T>
T* stepped(T* pointer, int count, int bytes) {
  static_assert(sizeof(T) == 1);
  return pointer + size_t(uint32_t(count)) * uint32_t(bytes);
}
inline int thread_index() { return emulator::thread_index(); }
inline int block_index() { return emulator::block_index(); }

inline void sync_cta(Where where = Where::current()) { emulator::sync_cta(where); }
inline void sync_warp(Where where = Where::current()) { emulator::sync_warp(where); }
inline void predecessor_wait(Where where = Where::current()) { emulator::predecessor_wait(where); }
inline void successor_begin(Where where = Where::current()) { emulator::successor_begin(where); }

inline void cluster_arrive(Where where = Where::current()) { emulator::cluster_arrive(where); }
inline void cluster_wait(Where where = Where::current()) { emulator::cluster_wait(where); }
inline void remote_store(SharedPtr to, int rank, Bytes16 value, SharedPtr arrival, Where where = Where::current()) {
  emulator::remote_store(to, rank, value, arrival, where);
}

template <class T>
T shared_load(SharedPtr from, Where where = Where::current()) {
  T value;
  emulator::read_shared(from, &value, sizeof(T), where);
  return value;
}
template <class T>
void shared_store(SharedPtr to, T value, Where where = Where::current()) {
  emulator::write_shared(to, &value, sizeof(T), where);
}
template <class T>
T global_load(const void* from, Where where = Where::current()) {
  T value;
  emulator::read_global(from, &value, sizeof(T), where);
  return value;
}
template <class T>
void global_store(void* to, T value, Where where = Where::current()) {
  emulator::write_global(to, &value, sizeof(T), where);
}

template <int BYTES>
void copy_async(SharedPtr to, const void* from, int valid = BYTES, Where where = Where::current()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulator::start_copy(to, from, BYTES, valid, where);
}
inline void copy_async_commit() { emulator::commit_copies(); }

// As in the code of sm_90, or, of a build that says so, of an older one.
#ifndef RES2NET_EMULATED_CODE
#define RES2NET_EMULATED_CODE 90
#endif
constexpr bool BULK_COPIES = RES2NET_EMULATED_CODE >= 90;
inline void proxy_fence() { emulator::proxy_fence(); }
inline void arrival_init(SharedPtr arrival, int threads = 1, Where where = Where::current()) {
  emulator::arrival_init(arrival, threads, where);
}
inline void arrival_signal(SharedPtr arrival, Where where = Where::current()) { emulator::arrival_signal(arrival, where); }
inline void arrival_expect(SharedPtr arrival, int bytes, Where where = Where::current()) {
  emulator::arrival_expect(arrival, bytes, where);
}
inline void arrival_wait(SharedPtr arrival, int parity, Where where = Where::current()) {
  emulator::arrival_wait(arrival, parity, where);
}
inline void arrival_wait_remote(SharedPtr arrival, int parity, Where where = Where::current()) {
  emulator::arrival_wait(arrival, parity, where);
}
inline void copy_bulk(SharedPtr to, const void* from, int bytes, SharedPtr arrival, Where where = Where::current()) {
  emulator::copy_bulk(to, from, bytes, arrival, where);
}
inline void copy_async_wait(int pending) { emulator::wait_copies(pending); }

inline FragmentA load_matrix(SharedPtr row, Where where = Where::current()) {
  FragmentA a;
  emulator::load_matrices(row, a.word, 4, where);
  return a;
}
inline FragmentB load_columns(SharedPtr column, Where where = Where::current()) {
  FragmentB b;
  emulator::load_matrices(column, b.word, 2, where);
  return b;
}
template <class Element, int COLUMNS>
void multiply(Accumulator (&c)[COLUMNS], const FragmentA& a, const FragmentB (&b)[COLUMNS], Where where = Where::current()) {
  emulator::multiply(c, &a, b, COLUMNS, Element::TYPE, where);
}

inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t round_to_tf32(uint32_t bits) {
  const bool number = (bits & 0x7fffffff) <= 0x7f800000;
  return number ? (bits + 0x1000) & 0xffffe000 : 0x7fffffff;
}

template <class Element>
uint32_t pack_pair(float low, float high) {
  if constexpr (Element::IS_BF16) return emulator::round_to_bf16(low) | uint32_t(emulator::round_to_bf16(high)) << 16;
  return emulator::round_to_fp16(low) | uint32_t(emulator::round_to_fp16(high)) << 16;
}
template <class Element>
Float2 unpack_pair(uint32_t pair) {
  if constexpr (Element::IS_BF16) return {emulator::widen_bf16(pair & 0xffff), emulator::widen_bf16(pair >> 16)};
  return {emulator::widen_fp16(pair & 0xffff), emulator::widen_fp16(pair >> 16)};
}
template <class Element>
uint32_t add_pair(uint32_t left, uint32_t right) {
  const Float2 a = unpack_pair<Element>(left), b = unpack_pair<Element>(right);
  return pack_pair<Element>(a.x + b.x, a.y + b.y);
}
inline float clamp(float value, float lower, float upper) { return value < lower ? lower : value > upper ? upper : value; }
template <class Element>
uint32_t clamp_pair(uint32_t pair, uint32_t lower, uint32_t upper) {
  const Float2 v = unpack_pair<Element>(pair), low = unpack_pair<Element>(lower), high = unpack_pair<Element>(upper);
  return pack_pair<Element>(clamp(v.x, low.x, high.x), clamp(v.y, low.y, high.y));
}
