// What Hopper alone has, beside hardware.h: wgmma, the products of a warpgroup (four neighbouring warps) of matrices that lie
// in shared memory. They run while the warps go on, and read through the "async proxy".
#pragma once
#include "cuda/chain/hardware.h"
#include "cuda/plan/geometry.h"

// A matrix of K = 32 bytes in shared memory, without a swizzle. It consists of blocks of 8 rows of 16 bytes, 128 bytes on end;
// `leading` bytes from a block to the one with the next 16 bytes of K, `stride` bytes to the one with the next 8 rows (of A)
// or columns (of B). In units of 16 bytes: the address in bits 0-13 (of 18 bits, whatever stands above), leading in 16-29,
// stride in 32-45. The upper word is a constant where `stride` is one.
RES2NET_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address, int leading, int stride) {
  const uint32_t lower = (address & 0x3ffff) >> 4 | uint32_t(leading) >> 4 << 16;
  return uint64_t(uint32_t(stride) >> 4) << 32 | lower;
}

#if !defined(__CUDACC__)
#include "emulator_sm90.h"
#else
struct SharedMatrix {
  uint64_t descriptor;
  DEVICE SharedMatrix(SharedPtr start, int leading, int stride)
      : descriptor(matrix_descriptor(start.address(), leading, stride)) {}
  DEVICE explicit SharedMatrix(uint64_t moved) : descriptor(moved) {}
  // That many times 16 bytes further on, or back: the address lies in the lower word, and ends up in shared memory.
  DEVICE SharedMatrix moved(int units) const {
    return SharedMatrix((descriptor & ~uint64_t(0xffffffff)) | (uint32_t(descriptor) + uint32_t(units)));
  }
};

// A value that all lanes of a warp agree on, so that the compiler knows.
DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
DEVICE SharedPtr uniform(SharedPtr place) { return {uint32_t(uniform(int(place.at)))}; }

// As arrival_wait, by all threads of a warp, which go on together: behind threads that go on one by one, the compiler keeps nothing
// in uniform registers, from which wgmma takes its matrices.
DEVICE void arrival_wait_together(SharedPtr arrival, int parity) {
  int ended;
  do {
    asm volatile("{.reg .pred ended; mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2; selp.b32 %0, 1, 0, ended;}"
                 : "=r"(ended)
                 : "r"(arrival.address()), "r"(parity)
                 : "memory");
  } while (!__all_sync(0xffffffffu, ended));
}

// The compiler may move nothing that touches the sums across this.
template <int TILES, int COLUMNS>
DEVICE void pin(Accumulator (&sums)[TILES][COLUMNS]) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      float (&v)[4] = sums[tile][j].value;
      asm volatile("" : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])::"memory");
    }
  }
}

// Around the products of these sums: before the first one; after the last one; until the committed ones have been finished, or
// all but those committed last, whose sums are not to be touched then.
template <int TILES, int COLUMNS>
DEVICE void products_begin(Accumulator (&sums)[TILES][COLUMNS]) {
  pin(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int TILES, int COLUMNS>
DEVICE void products_wait(Accumulator (&sums)[TILES][COLUMNS]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(sums);
}

DEVICE void products_wait_for_earlier() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

#define RES2NET_SUMS(j) "+f"(c[j].value[0]), "+f"(c[j].value[1]), "+f"(c[j].value[2]), "+f"(c[j].value[3])
#define RES2NET_SUMS_6 RES2NET_SUMS(0), RES2NET_SUMS(1), RES2NET_SUMS(2), RES2NET_SUMS(3), RES2NET_SUMS(4), RES2NET_SUMS(5)
#define RES2NET_SUMS_12 \
  RES2NET_SUMS_6, RES2NET_SUMS(6), RES2NET_SUMS(7), RES2NET_SUMS(8), RES2NET_SUMS(9), RES2NET_SUMS(10), RES2NET_SUMS(11)
#define RES2NET_NAMES_24 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define RES2NET_NAMES_28 RES2NET_NAMES_24 ", %24, %25, %26, %27"
#define RES2NET_NAMES_48 \
  RES2NET_NAMES_28 ", %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define RES2NET_NAMES_56 RES2NET_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
// sums += a * b: neither operand negated or transposed
#define RES2NET_WGMMA(N, TYPE, NAMES, A, B, ...)                                                                         \
  asm volatile("{.reg .pred adds; setp.eq.b32 adds, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
               " {" NAMES "}, %" #A ", %" #B ", adds, 1, 1, 0, 0;}"                                                      \
               : __VA_ARGS__                                                                                             \
               : "l"(a.descriptor), "l"(b.descriptor)                                                                    \
               : "memory")
#define RES2NET_WGMMA_OF(TYPE)                                                          \
  if constexpr (COLUMNS == 6)                                                           \
    RES2NET_WGMMA(48, TYPE, RES2NET_NAMES_24, 24, 25, RES2NET_SUMS_6);                  \
  else if constexpr (COLUMNS == 7)                                                      \
    RES2NET_WGMMA(56, TYPE, RES2NET_NAMES_28, 28, 29, RES2NET_SUMS_6, RES2NET_SUMS(6)); \
  else if constexpr (COLUMNS == 12)                                                     \
    RES2NET_WGMMA(96, TYPE, RES2NET_NAMES_48, 48, 49, RES2NET_SUMS_12);                 \
  else                                                                                  \
    RES2NET_WGMMA(112, TYPE, RES2NET_NAMES_56, 56, 57, RES2NET_SUMS_12, RES2NET_SUMS(12), RES2NET_SUMS(13))

// c += a * b in the background, by all threads of the warpgroup; a: 64 rows, b: 8 * COLUMNS columns. Warp w of the warpgroup
// holds rows 16 * w to 16 * w + 15, as `multiply` does. Half precision.
template <class Element, int COLUMNS>
DEVICE void multiply_async(Accumulator (&c)[COLUMNS], SharedMatrix a, SharedMatrix b) {
  static_assert(COLUMNS == 6 || COLUMNS == 7 || COLUMNS == 12 || COLUMNS == 14);
  if constexpr (Element::IS_BF16) {
    RES2NET_WGMMA_OF("bf16");
  } else {
    RES2NET_WGMMA_OF("f16");
  }
}
#undef RES2NET_WGMMA_OF
#undef RES2NET_WGMMA
#undef RES2NET_NAMES_56
#undef RES2NET_NAMES_48
#undef RES2NET_NAMES_28
#undef RES2NET_NAMES_24
#undef RES2NET_SUMS_12
#undef RES2NET_SUMS_6
#undef RES2NET_SUMS
#endif
