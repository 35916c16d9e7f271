// The hardware as the chain kernel sees it. The kernel uses nothing of CUDA but what is named here, so the same source
// compiles with nvcc (this file) and with a host compiler (tests/support/emulator/emulator.h), where every access is checked.
#pragma once
#include <cstdint>

#include "cuda/plan/data_type.h"

// The types of a chain's elements, as template arguments.
template <res2net_fused::cuda::DataType DATA_TYPE>
struct ElementOf {
  static constexpr res2net_fused::cuda::DataType TYPE = DATA_TYPE;
  static constexpr int BYTES = res2net_fused::cuda::bytes_of(TYPE);
  static constexpr bool IS_BF16 = TYPE == res2net_fused::cuda::BF16;
};
struct fp16 : ElementOf<res2net_fused::cuda::FP16> {};
struct bf16 : ElementOf<res2net_fused::cuda::BF16> {};
struct tf32 : ElementOf<res2net_fused::cuda::TF32> {};

// What one thread moves at once; sizeof(T) is the width of the memory instruction.
struct alignas(4) Bytes4 {
  uint32_t word[1];
};
struct alignas(8) Bytes8 {
  uint32_t word[2];
};
struct alignas(16) Bytes16 {
  uint32_t word[4];
};
struct alignas(8) Float2 {
  float x, y;
};

// Register fragments of mma: one thread's share of a matrix held by a warp.
struct FragmentA {  // 16 x 16, bf16 or fp16; 16 x 8, TF32
  uint32_t word[4];
};
struct alignas(8) FragmentB {  // 16 x 8, bf16 or fp16; 8 x 8, TF32
  uint32_t word[2];
};
struct Accumulator {  // 16 x 8, fp32
  float value[4];
};

#if !defined(__CUDACC__)
#include "emulator.h"
#else
#define DEVICE __device__ __forceinline__

// A byte of the CTA's shared memory, by its address there: generic pointers would be put together anew at every access.
// `part` names a region; only the host build checks its bounds.
struct SharedPtr {
  uint32_t at;
  DEVICE SharedPtr operator+(int offset) const { return {at + uint32_t(offset)}; }
  DEVICE SharedPtr operator^(int bits) const { return {at ^ uint32_t(bits)}; }
  // Its bits 4 and up, of which `mask` has those that change, combined with those from 7 on: the banks' swizzle.
  DEVICE SharedPtr swizzled(int mask) const { return {at ^ (at >> 3 & uint32_t(mask))}; }
  DEVICE SharedPtr part(int offset, int /*size*/, const char* /*name*/) const { return {at + uint32_t(offset)}; }
  DEVICE uint32_t address() const { return at; }
};

DEVICE SharedPtr shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  auto at = static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
#if __CUDA_ARCH__ >= 900
  asm("" : "+r"(at));  // not put together anew wherever it is used
#endif
  return {at};
}

// The same value, or pointer into global memory, which the compiler then keeps rather than compute it anew where it is used.
DEVICE int kept(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
DEVICE SharedPtr kept(SharedPtr place) { return {uint32_t(kept(int(place.at)))}; }
template <class T>
DEVICE T* kept(T* pointer) {
  size_t address = __cvta_generic_to_global(pointer);
  asm volatile("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// `count` times `bytes` further on, both without a sign. These become one instruction, where mad.wide becomes three.
template <class T>
DEVICE T* stepped(T* pointer, int count, int bytes) {
  static_assert(sizeof(T) == 1);
  uint64_t distance;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(distance) : "r"(count), "r"(bytes));
  return kept(pointer + distance);
}

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }

DEVICE void sync_cta() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// Programmatic dependent launch, from sm_90 on: a kernel launched so may begin while the one before it ends. Whatever that one
// writes, and whatever it may still read, is touched only behind this wait, by every thread for itself. A kernel that is launched
// as ever begins when the other has ended, and waits for nothing.
DEVICE void predecessor_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel begin, once all CTAs have come here. Only behind the wait: the next one then knows that all kernels before
// its own predecessor have ended.
DEVICE void successor_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Thread-block clusters, from sm_90 on. Code for older devices holds the calls too, and must never come to them: it may run on
// a newer device, compiled there from PTX, where numbers without barriers would be wrong in silence.
// Every thread of the cluster arrives and then waits: what one did before it arrived is visible to all after they waited.
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __trap();
#endif
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}
template <class T>
DEVICE T shared_load(SharedPtr from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t word[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word[0]) : "r"(from.at) : "memory");
  else if constexpr (sizeof(T) == 8)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(from.at) : "memory");
  else
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(from.at)
                 : "memory");
  T value;
  __builtin_memcpy(&value, word, sizeof(T));
  return value;
}
template <class T>
DEVICE void shared_store(SharedPtr to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t word[sizeof(T) / 4];
  __builtin_memcpy(word, &value, sizeof(T));
  if constexpr (sizeof(T) == 4)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to.at), "r"(word[0]) : "memory");
  else if constexpr (sizeof(T) == 8)
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to.at), "r"(word[0]), "r"(word[1]) : "memory");
  else
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to.at), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
}
template <class T>
DEVICE T global_load(const void* from) {
  return *static_cast<const T*>(from);
}
template <class T>
DEVICE void global_store(void* to, T value) {
  *static_cast<T*>(to) = value;
}

// cp.async: global to shared, finished only after copy_async_wait, and for other threads after a barrier as well. Of BYTES
// bytes `valid` are read, the rest of the destination becomes zero.
template <int BYTES>
DEVICE void copy_async(SharedPtr to, const void* from, int valid = BYTES) {
  const auto global = __cvta_generic_to_global(from);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()), "l"(global), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.address()), "l"(global), "n"(BYTES), "r"(valid)
                 : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's committed groups are unfinished. The instruction takes a constant; beyond 3
// it waits for more than it must, never for less.
DEVICE void copy_async_wait(int pending) {
  switch (pending) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
}

// From sm_90 on one thread copies a whole piece of global memory, which is on its way until its bytes have arrived at a barrier in
// shared memory (an mbarrier, 8 bytes). Such copies write through the "async proxy", as products of wgmma read.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool BULK_COPIES = true;
#else
constexpr bool BULK_COPIES = false;
#endif
// What this thread wrote to shared memory, its finished copies included, is visible to that proxy behind the next barrier.
DEVICE void proxy_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// For so many threads, each of which arrives once in a phase. Behind it a proxy fence and a barrier.
DEVICE void arrival_init(SharedPtr arrival, int threads = 1) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(arrival.address()), "r"(threads) : "memory");
#endif
}
// Arrives: what this thread did, and products that it waited for, come before the end of the phase.
DEVICE void arrival_signal(SharedPtr arrival) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(arrival.address()) : "memory");
#endif
}
// Arrives: the phase ends when so many bytes have been copied.
DEVICE void arrival_expect(SharedPtr arrival, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrival.address()), "r"(bytes) : "memory");
#endif
}
// Waits for the end of the phase of this parity: 0 for the first one, 1 for the second, and so on in turn. What was copied in it is
// visible to this thread then.
DEVICE void arrival_wait(SharedPtr arrival, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred ended;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n@!ended bra again;}" ::"r"(
          arrival.address()),
      "r"(parity)
      : "memory");
#endif
}
// Both places and `bytes` are multiples of 16.
DEVICE void copy_bulk(SharedPtr to, const void* from, int bytes, SharedPtr arrival) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to.address()),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(arrival.address())
               : "memory");
#endif
}

// Stores to the same place in the shared memory of another CTA of the cluster, where the 16 bytes arrive at that CTA's barrier.
// rank: blockIdx.x modulo the cluster's size.
DEVICE void remote_store(SharedPtr to, int rank, Bytes16 value, SharedPtr arrival) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 there, at; mapa.shared::cluster.u32 there, %0, %6; mapa.shared::cluster.u32 at, %1, %6; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%2, %3, %4, %5}, [at];}" ::"r"(to.address()),
      "r"(arrival.address()), "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3]), "r"(rank)
      : "memory");
#else
  __trap();
#endif
}
// As arrival_wait, for what other CTAs stored.
DEVICE void arrival_wait_remote(SharedPtr arrival, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred ended;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;}" ::"r"(arrival.address()),
      "r"(parity)
      : "memory");
#else
  __trap();
#endif
}

// ldmatrix.x4: lane i names bytes 16 * (i / 16) onwards of row i % 16, of a matrix of 16 rows of 32 bytes, and gets word i % 4
// of rows i / 4 and i / 4 + 8, then word i % 4 + 4 of both: the A of m16n8k16 for elements of 2 bytes, of m16n8k8 for 4.
DEVICE FragmentA load_matrix(SharedPtr row) {
  FragmentA a;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.word[0]), "=r"(a.word[1]), "=r"(a.word[2]), "=r"(a.word[3])
               : "r"(row.address())
               : "memory");
  return a;
}

// ldmatrix.x2, the same of a matrix of 8 rows: lane i of the first 16 names bytes 16 * (i / 8) onwards of row i % 8. The B of
// mma, where the rows are its columns.
DEVICE FragmentB load_columns(SharedPtr column) {
  FragmentB b;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(b.word[0]), "=r"(b.word[1])
               : "r"(column.address())
               : "memory");
  return b;
}

DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Rounds to the nearest TF32 number, away from zero at equal distance; keeps NaN.
DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(float_of(bits)));
  return rounded;
}

// c[j] += a * b[j]. In TF32 the hardware ignores the lowest 13 bits of a factor: it truncates.
template <class Element, int COLUMNS>
DEVICE void multiply(Accumulator (&c)[COLUMNS], const FragmentA& a, const FragmentB (&b)[COLUMNS]) {
#define RES2NET_MMA(SHAPE, TYPE)                                                                    \
  asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE                              \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
               : "+f"(c[j].value[0]), "+f"(c[j].value[1]), "+f"(c[j].value[2]), "+f"(c[j].value[3]) \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b[j].word[0]), "r"(b[j].word[1]))
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    if constexpr (Element::BYTES == 4)
      RES2NET_MMA("m16n8k8", "tf32");
    else if constexpr (Element::IS_BF16)
      RES2NET_MMA("m16n8k16", "bf16");
    else
      RES2NET_MMA("m16n8k16", "f16");
  }
#undef RES2NET_MMA
}

// A pair of half-precision elements in 32 bits: `low` is the channel with the lower index.
template <class Element>
DEVICE uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  if constexpr (Element::IS_BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class Element>
DEVICE Float2 unpack_pair(uint32_t pair) {
  if constexpr (Element::IS_BF16) {
    return {float_of(pair << 16), float_of(pair & 0xffff0000u)};
  } else {
    Float2 values;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(values.x), "=f"(values.y)
        : "r"(pair));
    return values;
  }
}
template <class Element>
DEVICE uint32_t add_pair(uint32_t left, uint32_t right) {  // one rounding
  uint32_t sum;
  if constexpr (Element::IS_BF16)  // sm_80 has no plain add
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(left), "r"(0x3f803f80u), "r"(right));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(left), "r"(right));
  return sum;
}
// A pair of half-precision elements clamped; keeps NaN.
template <class Element>
DEVICE uint32_t clamp_pair(uint32_t pair, uint32_t lower, uint32_t upper) {
  uint32_t result;
  if constexpr (Element::IS_BF16) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(lower));
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(result), "r"(upper));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(lower));
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(result), "r"(upper));
  }
  return result;
}
DEVICE float clamp(float value, float lower, float upper) {  // keeps NaN, as torch does; fmaxf would turn it into a number
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(lower));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(result), "f"(upper));
  return result;
}
#endif
