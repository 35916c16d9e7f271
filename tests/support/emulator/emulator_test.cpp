// Does the emulator see what it should, and nothing else? Tiny kernels, each with a known verdict.
#include <cmath>
#include <limits>

#include "emulator_test.h"

namespace {
template <class Element>
void matrix_product() {
  static float expected[16][8];
  const int lane = thread_index();
  if (lane == 0)
    for (int row = 0; row < 16; row++)
      for (int column = 0; column < 8; column++) {
        expected[row][column] = 0.5f;
        for (int k = 0; k < 16; k++) expected[row][column] += float((row * 3 + k) % 5) * float((k + column * 7) % 3);
      }
  for (int k = lane / 16 * 8; k < lane / 16 * 8 + 8; k += 2)  // A in rows of 32 bytes
    shared_store(
        word(lane % 16 * 8 + k / 2), pack_pair<Element>(float((lane % 16 * 3 + k) % 5), float((lane % 16 * 3 + k + 1) % 5)));
  sync_warp();
  const FragmentA a = load_matrix(word(lane % 16 * 8 + lane / 16 * 4));
  FragmentB b[1];
  for (int half = 0; half < 2; half++) {
    const int k = lane % 4 * 2 + half * 8, column = lane / 4;
    b[0].word[half] = pack_pair<Element>(float((k + column * 7) % 3), float((k + 1 + column * 7) % 3));
  }
  Accumulator c[1] = {{{0.5f, 0.5f, 0.5f, 0.5f}}};
  multiply<Element>(c, a, b);
  for (int i = 0; i < 4; i++)
    if (c[0].value[i] != expected[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]) failures++;
}

// Every finite fp16 number survives, and what lies between two goes to the nearer one, to the even one at equal distance.
void half_precision_round_trip() {
  for (uint32_t bits = 0; bits < 0x7c00; bits++) {
    const float value = emulator::widen_fp16(bits), next = emulator::widen_fp16(bits + 1);
    if (emulator::round_to_fp16(value) != bits || emulator::round_to_fp16(-value) != (bits | 0x8000)) failures++;
    if (bits == 0x7bff) break;
    const float middle = (value + next) / 2;
    if (emulator::round_to_fp16(middle) != bits + bits % 2) failures++;
    if (emulator::round_to_fp16(std::nextafter(middle, next)) != bits + 1) failures++;
  }
  if (emulator::round_to_fp16(65519.0f) != 0x7bff || emulator::round_to_fp16(65520.0f) != 0x7c00) failures++;
  if (emulator::widen_fp16(0x3c00) != 1.0f || emulator::widen_fp16(0xc500) != -5.0f || emulator::widen_fp16(1) != 0x1p-24f)
    failures++;
  if (emulator::round_to_bf16(1.00390625f) != 0x3f80 || emulator::round_to_bf16(1.01171875f) != 0x3f82) failures++;
}

// m16n8k8: A in rows of 32 bytes as well. What lies below a TF32 factor's last bit is ignored.
void matrix_product_tf32() {
  const int lane = thread_index();
  const auto left = [](int row, int k) { return float((row * 3 + k) % 5); };
  const auto right = [](int k, int column) { return float((k + column * 7) % 3); };
  const auto longer = [](float value) { return value == 0 ? 0 : bits_of(value) | 0x1fff; };
  for (int k = lane / 16 * 4; k < lane / 16 * 4 + 4; k++) shared_store(word(lane % 16 * 8 + k), longer(left(lane % 16, k)));
  sync_warp();
  const FragmentA a = load_matrix(word(lane % 16 * 8 + lane / 16 * 4));
  FragmentB b[1];
  for (int half = 0; half < 2; half++) b[0].word[half] = longer(right(lane % 4 + half * 4, lane / 4));
  Accumulator c[1] = {{{0.5f, 0.5f, 0.5f, 0.5f}}};
  multiply<tf32>(c, a, b);
  for (int i = 0; i < 4; i++) {
    float expected = 0.5f;
    for (int k = 0; k < 8; k++) expected += left(lane / 4 + i / 2 * 8, k) * right(k, lane % 4 * 2 + i % 2);
    if (c[0].value[i] != expected) failures++;
  }
}

void rounding_to_tf32() {
  const auto rounded = [](float value) { return float_of(round_to_tf32(bits_of(value))); };
  if (rounded(1 + 0x1p-11f) != 1 + 0x1p-10f || rounded(-1 - 0x1p-11f) != -1 - 0x1p-10f) failures++;  // away from zero
  if (rounded(1 + 0x1.ffep-12f) != 1 || rounded(3) != 3 || rounded(0x1.fffp0f) != 2) failures++;
  if (rounded(INFINITY) != INFINITY || rounded(std::nanf("")) == rounded(std::nanf(""))) failures++;
  if (float_of(round_to_tf32(0x7fffffff)) == float_of(round_to_tf32(0x7fffffff))) failures++;  // the GPU's own NaN
}

void clamping() {
  const float infinity = std::numeric_limits<float>::infinity();
  if (clamp(-1, 0, 20) != 0 || clamp(21, 0, 20) != 20 || clamp(3, 0, infinity) != 3 || clamp(-3, -infinity, infinity) != -3)
    failures++;
  const float nan = clamp(std::nanf(""), 0, 20);
  if (nan == nan) failures++;
}
enum class Fault {
  NONE,
  NO_PROXY_FENCE,
  PROXY_FENCE_BEFORE,
  FENCE_OF_OTHERS,
  NO_BARRIER,
  NO_BEGIN,
  SUMS_CHANGED,
  NO_COMMIT,
  NO_WAIT,
  OPERAND_CHANGED,
  OPERAND_COPIED,
  CHANGED_BEHIND_WAIT,
  CHANGED_BEHIND_BARRIER,
  COLUMNS_MISSING,
  BEYOND,
  NEGATIVE,
  WARP_MISSING,
  OTHER_STATEMENT
};
// One product of a warpgroup, right but for one thing.
template <class Element>
void product(Fault fault) {
  constexpr int COLUMNS = 6;
  const int thread = thread_index();
  const SharedPtr left = shared_memory().part(0, 2048, "A"), right = shared_memory().part(2048, 1536, "B");
  if (fault == Fault::PROXY_FENCE_BEFORE) proxy_fence();
  for (int i = thread; i < 512; i += 128) {  // A in two planes of 64 rows
    const int row = i / 4 % 64, k = i / 256 * 8 + i % 4 * 2;
    shared_store(left + i * 4, pack_pair<Element>(float((row * 3 + k) % 5), float((row * 3 + k + 1) % 5)));
  }
  for (int i = thread; i < (fault == Fault::COLUMNS_MISSING ? 383 : 384); i += 128) {  // of 8 columns both halves of K
    const int column = i / 64 * 8 + i / 4 % 8, k = i / 32 % 2 * 8 + i % 4 * 2;
    shared_store(right + i * 4, pack_pair<Element>(float((k + column * 7) % 3), float((k + 1 + column * 7) % 3)));
  }
  const bool fenced = fault != Fault::NO_PROXY_FENCE && fault != Fault::PROXY_FENCE_BEFORE;
  if (fenced && (fault != Fault::FENCE_OF_OTHERS || thread != 5)) proxy_fence();
  if (fault != Fault::NO_BARRIER) sync_cta();
  Accumulator sums[1][COLUMNS];
  for (Accumulator& sum : sums[0]) sum = {{0.5f, 0.5f, 0.5f, 0.5f}};
  if (fault == Fault::WARP_MISSING && thread >= 96) return;
  if (fault != Fault::NO_BEGIN) products_begin(sums);
  if (fault == Fault::SUMS_CHANGED && thread == 7) sums[0][2].value[1] = 0.25f;
  const SharedMatrix a = SharedMatrix(left, 1024, 128).moved(fault == Fault::BEYOND ? 1 : fault == Fault::NEGATIVE ? -1 : 0);
  const SharedMatrix b(right, 128, 256);
  if (fault == Fault::OTHER_STATEMENT && thread >= 64)
    multiply_async<Element>(sums[0], a, b);
  else
    multiply_async<Element>(sums[0], a, b);
  if (fault == Fault::OPERAND_CHANGED && thread == 100) shared_store(right, 0u);
  if (fault == Fault::OPERAND_COPIED && thread == 100) copy_async<4>(right, global_words);
  if (sums[0][0].value[0] == sums[0][0].value[0]) failures++;  // unknown until waited for
  if (fault != Fault::NO_COMMIT) products_commit();
  if (fault != Fault::NO_WAIT) products_wait(sums);
  if (fault == Fault::CHANGED_BEHIND_BARRIER) sync_cta();
  if ((fault == Fault::CHANGED_BEHIND_WAIT || fault == Fault::CHANGED_BEHIND_BARRIER) && thread == 100) shared_store(right, 0u);
  if (fault == Fault::OPERAND_COPIED && thread == 100) {
    copy_async_commit();
    copy_async_wait(0);
  }
  if (fault != Fault::NONE) return;
  for (int j = 0; j < COLUMNS; j++)
    for (int i = 0; i < 4; i++) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8, column = j * 8 + thread % 4 * 2 + i % 2;
      float expected = 0.5f;
      for (int k = 0; k < 16; k++) expected += float((row * 3 + k) % 5) * float((k + column * 7) % 3);
      if (sums[0][j].value[i] != expected) failures++;
    }
}

enum class Release { NONE, NOT_AWAITED, AWAITED_BY_PART, TOO_EARLY, OF_ONE_GROUP, FEWER, FORGOTTEN };
// Two warpgroups multiply what lies in a stage, and go on while it is filled anew, once all warps have said that they read it.
void release(Release fault) {
  const int thread = thread_index();
  const SharedPtr left = shared_memory().part(0, 2048, "A"), other = shared_memory().part(3584, 1536, "other");
  const SharedPtr stage = shared_memory().part(2048, 1536, "stage"), arrival = shared_memory().part(5120, 16, "arrivals");
  for (int i = thread; i < 1280; i += 256) shared_store(shared_memory() + i * 4, 0u);
  if (thread == 0) {
    arrival_init(arrival);
    arrival_init(arrival + 8, fault == Release::FEWER ? 7 : 8);
  }
  proxy_fence();
  sync_cta();
  Accumulator sums[1][6] = {};
  const auto multiply = [&](SharedPtr right) {
    multiply_async<bf16>(sums[0], SharedMatrix(left, 1024, 128), SharedMatrix(right, 128, 256));
  };
  const auto signal = [&] {
    const bool silent = thread / 32 == 5 && (fault == Release::FEWER || fault == Release::FORGOTTEN);
    if (thread % 32 == 0 && !silent) arrival_signal(arrival + 8);
  };
  products_begin(sums);
  multiply(stage);
  if (fault != Release::OF_ONE_GROUP) products_commit();
  multiply(other);
  products_commit();
  if (fault == Release::TOO_EARLY) signal();
  products_wait_for_earlier();
  if (fault != Release::TOO_EARLY) signal();
  if (thread < (fault == Release::AWAITED_BY_PART ? 9 : 32) && fault != Release::NOT_AWAITED)
    arrival_wait_together(arrival + 8, 0);
  if (thread == 0) {
    arrival_expect(arrival, 1536);
    for (int i = 0; i < 12; i++) copy_bulk(stage + i * 128, global_words, 128, arrival);
  }
  arrival_wait(arrival, 0);
  multiply(stage);
  products_commit();
  products_wait(sums);
}

void products() {
  using enum emulator::Kind;
  const auto name = [](emulator::Kind kind) { return emulator::KIND_NAMES[kind]; };
  const auto verdict = [](const char* title, const char* kind, Fault fault) {
    expect(title, kind, 128, [fault] { product<bf16>(fault); }, 1, 4096);
  };
  verdict("product, bf16", "", Fault::NONE);
  expect("product, fp16", "", 128, [] { product<fp16>(Fault::NONE); }, 1, 4096);
  verdict("product without a proxy fence", name(PROXY), Fault::NO_PROXY_FENCE);
  verdict("proxy fence before the writes", name(PROXY), Fault::PROXY_FENCE_BEFORE);
  verdict("proxy fence left out by one thread", name(PROXY), Fault::FENCE_OF_OTHERS);
  verdict("product without a barrier", "any", Fault::NO_BARRIER);  // which finding depends on the order
  verdict("product without products_begin", name(IN_FLIGHT), Fault::NO_BEGIN);
  verdict("sums changed behind products_begin", name(IN_FLIGHT), Fault::SUMS_CHANGED);
  verdict("product not committed", name(IN_FLIGHT), Fault::NO_COMMIT);
  verdict("product not waited for", name(IN_FLIGHT), Fault::NO_WAIT);
  verdict("operand changed before the wait", name(RACE), Fault::OPERAND_CHANGED);
  verdict("operand copied to before the wait", "any", Fault::OPERAND_COPIED);
  verdict("operand changed behind the wait, no barrier", name(RACE), Fault::CHANGED_BEHIND_WAIT);
  verdict("operand changed behind a barrier", "", Fault::CHANGED_BEHIND_BARRIER);
  verdict("operand not written", name(UNINITIALISED), Fault::COLUMNS_MISSING);
  verdict("operand beyond its region", name(OUT_OF_BOUNDS), Fault::BEYOND);
  verdict("operand before shared memory", "any", Fault::NEGATIVE);  // out of bounds, and other bits in the descriptor
  verdict("a warp leaves a product out", name(DIVERGENCE), Fault::WARP_MISSING);
  verdict("products of different statements", name(DIVERGENCE), Fault::OTHER_STATEMENT);
  const auto released = [](const char* title, const char* kind, Release fault) {
    expect(title, kind, 256, [fault] { release(fault); }, 1, 5136);
  };
  released("stage filled anew once all have read it", "", Release::NONE);
  released("stage filled anew without waiting", "any", Release::NOT_AWAITED);
  released("stage filled anew where a part of a warp waits", emulator::KIND_NAMES[DIVERGENCE], Release::AWAITED_BY_PART);
  released("stage released before it was read", "any", Release::TOO_EARLY);
  released("stage released while the last products read it", "any", Release::OF_ONE_GROUP);
  released("stage filled anew where one warp may read it", "any", Release::FEWER);
  released("stage that one warp does not release", "any", Release::FORGOTTEN);
  expect("product of half a warpgroup", name(DIVERGENCE), 64, [] { product<bf16>(Fault::NONE); }, 1, 4096);
  expect("lanes that do not agree", name(DIVERGENCE), 32, [] { uniform(thread_index() / 16); });
  expect("warps that do not agree", "", 64, [] {
    if (uniform(thread_index() / 32) != thread_index() / 32) failures++;
  });
}
}  // namespace

int main() {
  using enum emulator::Kind;
  const auto name = [](emulator::Kind kind) { return emulator::KIND_NAMES[kind]; };
  expect("own word", "", 64, [] {
    store(thread_index());
    load(thread_index());
  });
  expect("neighbour's word after a barrier", "", 64, [] {
    store(thread_index());
    sync_cta();
    load(63 - thread_index());
  });
  expect("lane's word after a warp barrier", "", 64, [] {
    store(thread_index());
    sync_warp();
    load(next_lane());
  });
  expect("other warp's word after a warp barrier", name(RACE), 64, [] {
    if (thread_index() < 32) store(thread_index());
    sync_cta();
    if (thread_index() < 32) store(thread_index());
    sync_warp();
    if (thread_index() >= 32) load(thread_index() - 32);
  });
  expect("overwritten after being read, no barrier", name(RACE), 64, [] {
    store(thread_index());
    sync_cta();
    load(63 - thread_index());
    store(thread_index());
  });
  expect("overwritten after being read, warp barrier", "", 32, [] {
    store(thread_index());
    sync_warp();
    load(next_lane());
    sync_warp();
    store(thread_index());
  });
  expect("never written", name(UNINITIALISED), 32, [] { shared_load<uint32_t>(word(thread_index())); });
  expect("past the end", name(OUT_OF_BOUNDS), 32, [] { store(1024 / 4 + thread_index()); });
  expect("past a region", name(OUT_OF_BOUNDS), 32, [] {
    shared_store(shared_memory().part(0, 64, "part") + thread_index() * 4, 0u);
  });
  expect("16 bytes at 8", name(MISALIGNED), 32, [] {
    if (thread_index() == 3) shared_store(word(2), Bytes16{});
  });
  expect("past a buffer", name(OUT_OF_BOUNDS), 96, [] { global_store(global_words + thread_index(), 0u); });
  expect("two threads store one word", name(RACE), 64, [] { global_store(global_words + thread_index() / 2, 0u); });
  for (uint32_t i = 0; i < 64; i++) global_words[i] = 1000 + i;  // no zeros, which would look like what is not copied
  expect("copy, wait", "", 32, [] {
    copy_async<4>(word(thread_index()), global_words + thread_index());
    copy_async_commit();
    copy_async_wait(0);
    shared_load<uint32_t>(word(thread_index()));
  });
  expect("copy, wait for the older group only", name(IN_FLIGHT), 32, [] {
    for (int i = 0; i < 2; i++) {
      copy_async<4>(word(thread_index() + 32 * i), global_words + thread_index());
      copy_async_commit();
    }
    copy_async_wait(1);
    shared_load<uint32_t>(word(thread_index()));
    shared_load<uint32_t>(word(thread_index() + 32));
    copy_async_wait(0);
  });
  expect("copy, no wait before the end", name(IN_FLIGHT), 32, [] {
    copy_async<4>(word(thread_index()), global_words + thread_index());
  });
  expect("another thread's copy, no barrier", "any", 64, [] {  // which finding depends on the order
    copy_async<4>(word(thread_index()), global_words + thread_index());
    copy_async_commit();
    copy_async_wait(0);
    shared_load<uint32_t>(word(63 - thread_index()));
  });
  expect("barriers of different statements", name(DIVERGENCE), 64, [] {
    if (thread_index() < 32)
      sync_cta();
    else
      sync_cta();
  });
  expect("half a warp ends before a warp barrier", name(DIVERGENCE), 64, [] {
    if (thread_index() % 2) sync_warp();
  });
  expect("copy cut short", "", 32, [] {
    copy_async<16>(word(thread_index() * 4), global_words, 8);
    copy_async_commit();
    copy_async_wait(0);
    const auto found = shared_load<Bytes16>(word(thread_index() * 4));
    if (found.word[1] != global_words[1] || found.word[2] != 0 || found.word[3] != 0) failures++;
  });
  expect("copy past a buffer, cut short before its end", "", 32, [] {
    copy_async<16>(word(thread_index() * 4), global_words + 60, 16);
    copy_async_commit();
    copy_async_wait(0);
  });
  expect("copy past a buffer", name(OUT_OF_BOUNDS), 32, [] {
    copy_async<8>(word(thread_index() * 2), global_words + 64);
    copy_async_commit();
    copy_async_wait(0);
  });
  cluster_kernels();
  overlapping_kernels();
  bulk_copies();
  expect("matrix product, bf16", "", 32, matrix_product<bf16>);
  expect("matrix product, fp16", "", 32, matrix_product<fp16>);
  expect("matrix product, tf32", "", 32, matrix_product_tf32);
  products();
  half_precision_round_trip();
  rounding_to_tf32();
  clamping();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
