// Every primitive of csrc/cuda/chain/hardware.h and hardware_sm90.h against its definition.
// nvcc compiles this file for a GPU, a host compiler
// (-x c++) for the emulator: both forms must pass. Prints one line per failure.
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#define __global__
#define __host__
#define __device__
#endif

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/chain/hardware_sm90.h"
#include "cuda/plan/geometry.h"

namespace {
int failures = 0;

void expect(const char* what, bool good) {
  if (good) return;
  std::printf("%s\n", what);
  failures++;
}

// Runs `kernel` with one cluster of so many blocks; returns the words it wrote.
template <class Kernel>
std::vector<uint32_t> run(Kernel kernel, int threads, const std::vector<uint32_t>& input, int outputs, int blocks = 1) {
  std::vector<uint32_t> result(outputs, ~0u);
#if defined(__CUDACC__)
  uint32_t *in = nullptr, *out = nullptr;
  cudaMalloc(&in, input.size() * 4);
  cudaMalloc(&out, outputs * 4);
  cudaMemcpy(in, input.data(), input.size() * 4, cudaMemcpyHostToDevice);
  cudaMemcpy(out, result.data(), outputs * 4, cudaMemcpyHostToDevice);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = 8192;
  config.attrs = &cluster, config.numAttrs = blocks > 1 ? 1 : 0;
  const uint32_t* read_only = in;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, read_only, out);
  expect(cudaGetErrorString(launched), launched == cudaSuccess);
  const cudaError_t error = cudaMemcpy(result.data(), out, outputs * 4, cudaMemcpyDeviceToHost);
  expect(cudaGetErrorString(error), error == cudaSuccess);
  cudaFree(in);
  cudaFree(out);
#else
  const emulator::Launch launch{blocks, threads, 8192, 1, true, {{"in", input.data(), input.size() * 4, false}}, blocks};
  const emulator::Report report = emulator::run(launch, [&] { kernel(input.data(), result.data()); });
  for (const std::string& found : report.first) expect(found.c_str(), found.empty());
#endif
  return result;
}

__host__ __device__ float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
__host__ __device__ uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Row i of a 16 x 16 matrix is words 8 i ... 8 i + 7 of `in`; B is k + 16 j of 16 x 8. Small integers: every sum is exact.
template <class Element>
__global__ void matrix_product(const uint32_t* in, uint32_t* out) {
  const SharedPtr shared = shared_memory();
  const int lane = thread_index();
  for (int i = lane; i < 128; i += 32) shared_store(shared + i * 4, global_load<uint32_t>(in + i));
  sync_warp();
  const FragmentA a = load_matrix(shared + (lane % 16 * 8 + lane / 16 * 4) * 4);
  const FragmentB columns = load_columns(shared + (lane % 8 * 8 + lane / 8 % 2 * 4) * 4);
  const bool columns_right = columns.word[0] == a.word[0] && columns.word[1] == a.word[2];  // rows 0 to 7
  FragmentB b[2];
  for (int j = 0; j < 2; j++)
    for (int half = 0; half < 2; half++) {
      const int k = lane % 4 * 2 + half * 8, column = j * 8 + lane / 4;
      b[j].word[half] = pack_pair<Element>(float((k + column * 7) % 3), float((k + 1 + column * 7) % 3));
    }
  Accumulator c[2];
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 4; i++) c[j].value[i] = columns_right ? 0.5f : NAN;
  multiply<Element>(c, a, b);
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 16 + j * 8 + lane % 4 * 2 + i % 2] = as_bits(c[j].value[i]);
}

template <class Element>
void test_matrix_product(uint32_t (*pack)(int, int), const char* what) {
  std::vector<uint32_t> a(128);
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k += 2) a[row * 8 + k / 2] = pack((row * 3 + k) % 5, (row * 3 + k + 1) % 5);
  const auto c = run(matrix_product<Element>, 32, a, 256);
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 16; column++) {
      float sum = 0.5f;
      for (int k = 0; k < 16; k++) sum += float((row * 3 + k) % 5) * float((k + column * 7) % 3);
      expect(what, as_float(c[row * 16 + column]) == sum);
    }
}
// Integers 0 ... 4 as bits
uint32_t pack_bf16(int low, int high) {
  const uint32_t bits[] = {0, 0x3f80, 0x4000, 0x4040, 0x4080};
  return bits[low] | bits[high] << 16;
}
uint32_t pack_fp16(int low, int high) {
  const uint32_t bits[] = {0, 0x3c00, 0x4000, 0x4200, 0x4400};
  return bits[low] | bits[high] << 16;
}

// The same of float32: row i of 16 x 8 is words 8 i ... 8 i + 7 of `in`, B is k + 7 j of 8 x 16. TRUNCATES: every factor has
// its lowest 13 bits set, which the product must not see.
template <bool TRUNCATES>
__global__ void tf32_product(const uint32_t* in, uint32_t* out) {
  const SharedPtr shared = shared_memory();
  const int lane = thread_index();
  const uint32_t low = TRUNCATES ? 0x1fff : 0;
  for (int i = lane; i < 128; i += 32) shared_store(shared + i * 4, global_load<uint32_t>(in + i) | low);
  sync_warp();
  const FragmentA a = load_matrix(shared + (lane % 16 * 8 + lane / 16 * 4) * 4);
  const FragmentB columns = load_columns(shared + (lane % 8 * 8 + lane / 8 % 2 * 4) * 4);
  const bool columns_right = columns.word[0] == a.word[0] && columns.word[1] == a.word[2];  // rows 0 to 7
  FragmentB b[2];
  for (int j = 0; j < 2; j++)
    for (int half = 0; half < 2; half++) {
      const int k = lane % 4 + half * 4, column = j * 8 + lane / 4;
      b[j].word[half] = bits_of(float((k + column * 7) % 3 + 1)) | low;
    }
  Accumulator c[2];
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 4; i++) c[j].value[i] = columns_right ? 0.5f : NAN;
  multiply<tf32>(c, a, b);
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 16 + j * 8 + lane % 4 * 2 + i % 2] = as_bits(c[j].value[i]);
}

template <bool TRUNCATES>
void test_tf32_product(const char* what) {
  std::vector<uint32_t> a(128);
  const auto factor_a = [](int row, int k) { return float((row * 3 + k) % 5 + 1); };
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 8; k++) a[row * 8 + k] = as_bits(factor_a(row, k));
  const auto c = run(tf32_product<TRUNCATES>, 32, a, 256);
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 16; column++) {
      float sum = 0.5f;
      for (int k = 0; k < 8; k++) sum += factor_a(row, k) * float((k + column * 7) % 3 + 1);
      expect(what, as_float(c[row * 16 + column]) == sum);
    }
}

// Ties go away from zero, what rounds up past the largest number becomes infinite, NaN stays NaN.
__global__ void tf32_rounding(const uint32_t* in, uint32_t* out) { out[thread_index()] = round_to_tf32(in[thread_index()]); }

void test_tf32_rounding() {
  const uint32_t cases[][2] = {
      {0x3f800000, 0x3f800000}, {0x3f800fff, 0x3f800000}, {0x3f801000, 0x3f802000}, {0x3f802fff, 0x3f802000},
      {0x3f803000, 0x3f804000}, {0xbf801000, 0xbf802000}, {0xbf800fff, 0xbf800000}, {0x3fffffff, 0x40000000},
      {0x7f7fffff, 0x7f800000}, {0x7f800000, 0x7f800000}, {0xff800000, 0xff800000}, {0x80000000, 0x80000000},
  };
  std::vector<uint32_t> in;
  for (const auto& pair : cases) in.push_back(pair[0]);
  const size_t numbers = in.size();
  in.resize(32, 0x7f800001);  // a warp
  const auto out = run(tf32_rounding, 32, in, 32);
  for (size_t i = 0; i < numbers; i++) expect("rounding to TF32", out[i] == cases[i][1]);
  for (size_t i = numbers; i < 32; i++) expect("NaN rounded to TF32", std::isnan(as_float(out[i])));
}

// Four warps multiply the 64 rows from row 1, then those from row 2, of A in two planes of 67 rows, by B in blocks of 8
// columns.
// The shared memory that they read is filled by copies and by stores.
constexpr int PLANE = 67;
template <class Element, int COLUMNS>
__global__ void async_product(const uint32_t* in, uint32_t* out) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const SharedPtr left = shared_memory().part(0, 2 * PLANE * 16, "A");
  const SharedPtr right = shared_memory().part(2 * PLANE * 16, COLUMNS * 256, "B");
  const int thread = thread_index();
  for (int i = thread; i < 2 * PLANE * 4; i += 128) shared_store(left + i * 4, global_load<uint32_t>(in + i));
  for (int i = thread; i < COLUMNS * 16; i += 128) copy_async<16>(right + i * 16, in + 2 * PLANE * 4 + i * 4);
  copy_async_commit();
  copy_async_wait(0);
  proxy_fence();
  sync_cta();
  Accumulator sums[1][COLUMNS];
  for (int j = 0; j < COLUMNS; j++)
    for (int i = 0; i < 4; i++) sums[0][j].value[i] = 0.5f;
  const SharedMatrix a(left, PLANE * 16, 128), b(right, 128, 256);
  products_begin(sums);
  multiply_async<Element>(sums[0], a.moved(1), b);
  multiply_async<Element>(sums[0], a.moved(5).moved(-3), b);
  products_commit();
  products_wait(sums);
  const int warp = uniform(thread / 32), lane = thread % 32;
  for (int j = 0; j < COLUMNS; j++)
    for (int i = 0; i < 4; i++)
      out[(warp * 16 + lane / 4 + i / 2 * 8) * 8 * COLUMNS + j * 8 + lane % 4 * 2 + i % 2] = as_bits(sums[0][j].value[i]);
#endif
}

template <class Element, int COLUMNS>
void test_async_product(uint32_t (*pack)(int, int), const char* what) {
  const auto factor_a = [](int row, int k) { return (row * 3 + k) % 5; };
  const auto factor_b = [](int k, int column) { return (k + column * 7) % 3; };
  std::vector<uint32_t> in;
  for (int half = 0; half < 2; half++)
    for (int row = 0; row < PLANE; row++)
      for (int k = half * 8; k < half * 8 + 8; k += 2) in.push_back(pack(factor_a(row, k), factor_a(row, k + 1)));
  for (int block = 0; block < 2 * COLUMNS; block++)
    for (int column = block / 2 * 8; column < block / 2 * 8 + 8; column++)
      for (int k = block % 2 * 8; k < block % 2 * 8 + 8; k += 2)
        in.push_back(pack(factor_b(k, column), factor_b(k + 1, column)));
  const auto out = run(async_product<Element, COLUMNS>, 128, in, 64 * 8 * COLUMNS);
  for (int row = 0; row < 64; row++)
    for (int column = 0; column < 8 * COLUMNS; column++) {
      float sum = 0.5f;
      for (int k = 0; k < 16; k++) sum += float((factor_a(row + 1, k) + factor_a(row + 2, k)) * factor_b(k, column));
      expect(what, as_float(out[row * 8 * COLUMNS + column]) == sum);
    }
}

template <class Element>
void test_async_products(uint32_t (*pack)(int, int), const char* what) {
#if defined(__CUDACC__)
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (major != 9) return;
#endif
  test_async_product<Element, 6>(pack, what);
  test_async_product<Element, 7>(pack, what);
  test_async_product<Element, 12>(pack, what);
  test_async_product<Element, 14>(pack, what);
}

// Copies of 16, 8 and 4 bytes, whole and cut short, in two groups of which the first is waited for alone.
__global__ void copies(const uint32_t* in, uint32_t* out) {
  const SharedPtr shared = shared_memory();
  const int thread = thread_index();
  for (int i = 0; i < 12; i++) shared_store(shared + (thread * 12 + i) * 4, 0x12345678u);
  copy_async<16>(shared + thread * 48, in + thread * 8, 16);
  copy_async<16>(shared + thread * 48 + 16, in + thread * 8 + 4, 4);
  copy_async_commit();
  copy_async<8>(shared + thread * 48 + 32, stepped(reinterpret_cast<const unsigned char*>(in), thread, 32));
  copy_async<4>(shared + thread * 48 + 40, in + thread * 8 + 2, 4);
  copy_async_commit();
  copy_async_wait(1);
  const auto first = shared_load<Bytes16>(shared + thread * 48);
  copy_async_wait(0);
  sync_cta();
  const int other = 63 - thread;  // what another thread copied
  for (int i = 0; i < 12; i++) out[other * 16 + i] = shared_load<uint32_t>(shared + (other * 12 + i) * 4);
  for (int i = 0; i < 4; i++) out[thread * 16 + 12 + i] = first.word[i];
}

void test_copies() {
  std::vector<uint32_t> in(64 * 8);
  for (size_t i = 0; i < in.size(); i++) in[i] = uint32_t(i * 2654435761u);
  const auto out = run(copies, 64, in, 64 * 16);
  for (int thread = 0; thread < 64; thread++) {
    const uint32_t *from = &in[thread * 8], *found = &out[thread * 16];
    expect("copy of 16 bytes", std::memcmp(found, from, 16) == 0);
    expect("copy of 16 bytes cut to 4", found[4] == from[4] && !found[5] && !found[6] && !found[7]);
    expect("copy of 8 bytes", std::memcmp(found + 8, from, 8) == 0);
    expect("copy of 4 bytes", found[10] == from[2] && found[11] == 0x12345678u);
    expect("first group alone", std::memcmp(found + 12, from, 16) == 0);
  }
}

// Two stages of 512 bytes in turn, each filled three times by two copies of one thread, once all warps have released it.
__global__ void bulk_copies(const uint32_t* in, uint32_t* out) {
  const SharedPtr shared = shared_memory();
  const int thread = thread_index();
  const auto arrival = [&](int stage) { return shared + (1024 + 8 * stage); };
  const auto released = [&](int stage) { return shared + (1040 + 8 * stage); };
  const auto start = [&](int turn) {
    if (thread > 0 || turn >= 6) return;
    const int stage = turn % 2;
    if (turn >= 2) arrival_wait(released(stage), (turn / 2 - 1) & 1);
    arrival_expect(arrival(stage), 512);
    for (int half = 0; half < 2; half++)
      copy_bulk(shared + (stage * 512 + half * 256), in + turn * 128 + half * 64, 256, arrival(stage));
  };
  if (thread == 0) {
    for (int stage = 0; stage < 2; stage++) arrival_init(arrival(stage)), arrival_init(released(stage), 4);
    proxy_fence();
  }
  start(0);
  sync_cta();
  for (int turn = 0; turn < 6; turn++) {
    start(turn + 1);
    arrival_wait(arrival(turn % 2), turn / 2 & 1);
    out[turn * 128 + 127 - thread] = shared_load<uint32_t>(shared + (turn % 2 * 512 + (127 - thread) * 4));
    sync_cta();
    if (thread % 32 == 0) arrival_signal(released(turn % 2));
  }
}

void test_bulk_copies() {
#if defined(__CUDACC__)
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (major < 9) return;
#endif
  std::vector<uint32_t> in(6 * 128);
  for (size_t i = 0; i < in.size(); i++) in[i] = uint32_t(i * 2654435761u);
  expect("bulk copies", run(bulk_copies, 128, in, int(in.size())) == in);
}

// Five CTAs pass 16 bytes a thread on to the next, four times: each then has what the one before it had, and so on around.
__global__ void pass_around(const uint32_t* in, uint32_t* out) {
  const SharedPtr shared = shared_memory();
  const int thread = thread_index(), block = block_index();
  const auto arrival = [&](int turn) { return shared + (4096 + turn * 8); };
  if (thread == 0)
    for (int turn = 0; turn < 4; turn++) arrival_init(arrival(turn));
  Bytes16 mine = global_load<Bytes16>(in + (block * 64 + thread) * 4);
  sync_cta();
  cluster_arrive();
  cluster_wait();  // all run, and have their barriers
  for (int turn = 0; turn < 4; turn++) {
    if (thread == 0) arrival_expect(arrival(turn), 1024);
    remote_store(shared + turn * 1024 + (63 - thread) * 16, (block + 1) % 5, mine, arrival(turn));
    arrival_wait_remote(arrival(turn), 0);
    mine = shared_load<Bytes16>(shared + turn * 1024 + thread * 16);
  }
  for (int i = 0; i < 4; i++) out[(block * 64 + thread) * 4 + i] = mine.word[i];
}

void test_clusters() {
#if defined(__CUDACC__)
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (major < 9) return;
#endif
  std::vector<uint32_t> in(5 * 64 * 4);
  for (size_t i = 0; i < in.size(); i++) in[i] = uint32_t(i * 2654435761u);
  const auto out = run(pass_around, 64, in, int(in.size()), 5);
  for (int block = 0; block < 5; block++)  // four turns in five CTAs: from the next one; reversed four times: as it was
    expect("passed around the cluster", std::memcmp(&out[block * 256], &in[(block + 1) % 5 * 256], 1024) == 0);
}

// A kernel that takes long to write what the next one reads, which begins meanwhile.
__global__ void late(const uint32_t* in, uint32_t* out) {
  predecessor_wait();
  successor_begin();
#if defined(__CUDACC__)
  for (const long long begin = clock64(); clock64() - begin < 2000000;) {
  }
#endif
  global_store(out + thread_index(), global_load<uint32_t>(in + thread_index()));
}
__global__ void after(const uint32_t* in, uint32_t* out) {
  predecessor_wait();
  successor_begin();
  global_store(out + thread_index(), global_load<uint32_t>(in + thread_index()) + 1);
}

void test_overlap() {
  constexpr int WORDS = 64;
  std::vector<uint32_t> in(WORDS), out(WORDS);
  for (int i = 0; i < WORDS; i++) in[i] = uint32_t(i * 2654435761u);
#if defined(__CUDACC__)
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (major < 9) return;
  uint32_t* words = nullptr;  // in, what lies between the kernels, out
  cudaMalloc(&words, 3 * WORDS * 4);
  cudaMemset(words, 0, 3 * WORDS * 4);
  cudaMemcpy(words, in.data(), WORDS * 4, cudaMemcpyHostToDevice);
  cudaLaunchAttribute overlaps;
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1), config.blockDim = dim3(WORDS), config.attrs = &overlaps, config.numAttrs = 1;
  const uint32_t *first = words, *second = words + WORDS;
  cudaLaunchKernelEx(&config, late, first, words + WORDS);
  const cudaError_t launched = cudaLaunchKernelEx(&config, after, second, words + 2 * WORDS);
  expect(cudaGetErrorString(launched), launched == cudaSuccess);
  const cudaError_t error = cudaMemcpy(out.data(), words + 2 * WORDS, WORDS * 4, cudaMemcpyDeviceToHost);
  expect(cudaGetErrorString(error), error == cudaSuccess);
  cudaFree(words);
#else
  std::vector<uint32_t> between(WORDS);
  const auto overlapping = [](auto kernel, std::vector<uint32_t>& from, std::vector<uint32_t>& to) {
    const emulator::Launch launch{
        1, WORDS, 0, 1, true, {{"in", from.data(), WORDS * 4, false, true}, {"out", to.data(), WORDS * 4, true, true}},
        1, true};
    const emulator::Report report = emulator::run(launch, [&] { kernel(from.data(), to.data()); });
    for (const std::string& found : report.first) expect(found.c_str(), found.empty());
  };
  overlapping(late, in, between);
  overlapping(after, between, out);
#endif
  for (int i = 0; i < WORDS; i++) expect("read behind the kernel before", out[i] == in[i] + 1);
}

// in: pairs of floats; out: packed, unpacked again, sum of the pair with itself, clamped
template <class Element>
__global__ void arithmetic(const uint32_t* in, uint32_t* out) {
  const int i = thread_index();
  const float x = as_float(in[2 * i]), y = as_float(in[2 * i + 1]);
  const uint32_t pair = pack_pair<Element>(x, y);
  const Float2 back = unpack_pair<Element>(pair);
  const Float2 sum = unpack_pair<Element>(add_pair<Element>(pair, pack_pair<Element>(1.0f, -y)));
  out[8 * i] = pair;
  out[8 * i + 1] = as_bits(back.x), out[8 * i + 2] = as_bits(back.y);
  out[8 * i + 3] = as_bits(sum.x), out[8 * i + 4] = as_bits(sum.y);
  out[8 * i + 5] = as_bits(clamp(x, 0.0f, 20.0f)), out[8 * i + 6] = as_bits(clamp(y, -INFINITY, INFINITY));
  out[8 * i + 7] = uint32_t(res2net_fused::cuda::FastDivisor(i + 1).divide(30000 + i));
}

template <class Element>
void test_arithmetic(float step, const char* name) {  // step: the distance of numbers just above 1
  std::vector<uint32_t> in;
  for (int i = 0; i < 64; i++) {
    in.push_back(as_bits(i == 63 ? NAN : 1 + i * step / 2));  // every second one lies between two numbers
    in.push_back(as_bits(i % 2 ? -3.0f * i : 2.0f * i));
  }
  const auto out = run(arithmetic<Element>, 64, in, 64 * 8);
  for (int i = 0; i < 63; i++) {
    const int even = i % 2 == 0 ? i / 2 : (i / 2 + 1) / 2 * 2;  // ties go to the even one
    expect(name, as_float(out[8 * i + 1]) == 1 + even * step);
    expect(name, as_float(out[8 * i + 2]) == as_float(in[2 * i + 1]));
    const float sum = 2 + even * step;  // the sum is rounded to the doubled distance
    expect(name, std::fabs(as_float(out[8 * i + 3]) - sum) <= step && as_float(out[8 * i + 4]) == 0);
    expect("clamp", as_float(out[8 * i + 5]) == as_float(in[2 * i]) && as_float(out[8 * i + 6]) == as_float(in[2 * i + 1]));
    expect("FastDivisor", int(out[8 * i + 7]) == (30000 + i) / (i + 1));
  }
  expect("NaN lost", std::isnan(as_float(out[63 * 8 + 1])) && std::isnan(as_float(out[63 * 8 + 5])));
}
}  // namespace

int main() {
  test_matrix_product<bf16>(pack_bf16, "matrix product, bf16");
  test_matrix_product<fp16>(pack_fp16, "matrix product, fp16");
  test_tf32_product<false>("matrix product, tf32");
  test_tf32_product<true>("matrix product, tf32, lowest bits of the factors");
  test_tf32_rounding();
  test_async_products<bf16>(pack_bf16, "wgmma, bf16");
  test_async_products<fp16>(pack_fp16, "wgmma, fp16");
  test_copies();
  test_bulk_copies();
  test_clusters();
  test_overlap();
  test_arithmetic<bf16>(0x1p-7f, "arithmetic, bf16");
  test_arithmetic<fp16>(0x1p-10f, "arithmetic, fp16");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
