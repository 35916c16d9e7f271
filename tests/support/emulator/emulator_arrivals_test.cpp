// Does the emulator see what it should of clusters, bulk copies and launches that overlap?
#include "emulator_test.h"

namespace {
void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}
// Of what others send: two, in turn.
SharedPtr exchange(int turn) { return shared_memory() + (1008 + turn % 2 * 8); }
void exchanges_begin() {
  if (thread_index() == 0) {
    arrival_init(exchange(0));
    arrival_init(exchange(1));
  }
  sync_cta();
  cluster_barrier();  // all run, and have their barriers
}
// 16 bytes a thread to another CTA, `ahead` of this one, into a place for those of its sender; turns take two of these in turn.
SharedPtr place_of(int turn, int sender) { return shared_memory() + (turn % 2 * 3 + sender) * 160; }
void send(int turn, int ahead, uint32_t value, int lanes = 10) {
  if (thread_index() >= lanes) return;
  const SharedPtr to = place_of(turn, block_index()) + thread_index() * 16;
  remote_store(to, (block_index() + ahead) % 3, Bytes16{{value, value, value, value}}, exchange(turn));
}
void expect_from(int turn, int bytes) {
  if (thread_index() == 0) arrival_expect(exchange(turn), bytes);
}
uint32_t received(int turn, int sender) {
  return shared_load<Bytes16>(place_of(turn, sender) + thread_index() % 10 * 16).word[3];
}
// One turn: to both others, and from them.
void turn_around(int turn) {
  expect_from(turn, 320);
  send(turn, 1, uint32_t(turn));
  send(turn, 2, uint32_t(turn));
  arrival_wait_remote(exchange(turn), turn / 2 % 2);
  for (int ahead = 1; ahead <= 2; ahead++)
    if (received(turn, (block_index() + ahead) % 3) != uint32_t(turn)) failures++;
  sync_cta();  // read, before the next turn tells others so
}

// One thread copies 128 bytes in bulk; all wait for them, and read.
enum class Bulk {
  NONE,
  NO_INIT,
  NO_FENCE,
  NO_BARRIER,
  NO_EXPECT,
  TOO_FEW,
  TOO_MANY,
  EXPECTED_TWICE,
  NO_WAIT,
  OTHER_PARITY,
  WAITED_BY_ANOTHER,
  WAITED_BY_ANOTHER_BARRIER,
  STORED_BEFORE,
  STORED_BEFORE_FENCED,
  READ_BEFORE,
  MISALIGNED_SIZE,
  MISALIGNED_PLACE,
  PAST_BUFFER,
  PAST_REGION
};
void bulk_copy(Bulk fault) {
  const int thread = thread_index();
  const SharedPtr to = shared_memory().part(0, 256, "to"), arrival = shared_memory().part(256, 8, "arrival");
  const bool stored = fault == Bulk::STORED_BEFORE || fault == Bulk::STORED_BEFORE_FENCED || fault == Bulk::READ_BEFORE;
  if (stored && thread < 32) {
    shared_store(to + thread * 4, 7u);
    if (fault != Bulk::STORED_BEFORE) proxy_fence();
  }
  if (thread == 5 && fault != Bulk::NO_INIT) {
    arrival_init(arrival);
    if (fault != Bulk::NO_FENCE) proxy_fence();
  }
  if (fault != Bulk::NO_BARRIER) sync_cta();
  if (fault == Bulk::READ_BEFORE) shared_load<uint32_t>(to + thread % 32 * 4);
  for (int phase = 0; phase < 3; phase++) {
    if (thread == 0) {
      if (fault != Bulk::NO_EXPECT) arrival_expect(arrival, fault == Bulk::TOO_FEW ? 64 : fault == Bulk::TOO_MANY ? 256 : 128);
      if (fault == Bulk::EXPECTED_TWICE) arrival_expect(arrival, 0);
      const uint32_t* const from = global_words + (fault == Bulk::PAST_BUFFER ? 48 : phase * 16);
      const int place = fault == Bulk::MISALIGNED_PLACE ? 8 : fault == Bulk::PAST_REGION ? 144 : 0;
      copy_bulk(to + place, from, fault == Bulk::MISALIGNED_SIZE ? 120 : 128, arrival);
    }
    const bool by_another = fault == Bulk::WAITED_BY_ANOTHER || fault == Bulk::WAITED_BY_ANOTHER_BARRIER;
    if (fault != Bulk::NO_WAIT && (!by_another || thread == 40))
      arrival_wait(arrival, fault == Bulk::OTHER_PARITY ? 1 : phase & 1);
    if (fault == Bulk::WAITED_BY_ANOTHER_BARRIER) sync_cta();
    const uint32_t found = shared_load<uint32_t>(to + thread % 32 * 4);
    if (fault == Bulk::NONE && found != global_words[phase * 16 + thread % 32]) failures++;
    if (fault != Bulk::NONE && fault != Bulk::WAITED_BY_ANOTHER_BARRIER) return;
    sync_cta();  // read before the next copy overwrites it
  }
}
}  // namespace

// Kernels of three CTAs of one warp each.
void cluster_kernels() {
  using enum emulator::Kind;
  const auto verdict = [](const char* title, const char* kind, auto kernel) { expect(title, kind, 32, kernel, 3); };
  const auto name = [](emulator::Kind kind) { return emulator::KIND_NAMES[kind]; };
  verdict("sent to the next CTA", "", [] {
    exchanges_begin();
    expect_from(0, 160);
    send(0, 1, uint32_t(block_index()));
    arrival_wait_remote(exchange(0), 0);
    if (received(0, (block_index() + 2) % 3) != uint32_t((block_index() + 2) % 3)) failures++;
  });
  verdict("read before it has arrived", "any", [] {
    exchanges_begin();
    expect_from(0, 160);
    send(0, 1, 1);
    received(0, (block_index() + 2) % 3);
    arrival_wait_remote(exchange(0), 0);
  });
  verdict("a barrier of the cluster instead of the wait", "any", [] {
    exchanges_begin();
    expect_from(0, 160);
    send(0, 1, 1);
    cluster_barrier();
    received(0, (block_index() + 2) % 3);
  });
  verdict("sent to one that has not said that it has read", "any", [] {
    exchanges_begin();
    for (int turn = 0; turn < 4; turn++) {
      expect_from(turn, 160);
      send(turn, 1, uint32_t(turn));  // in a circle: the next one is not heard of
      arrival_wait_remote(exchange(turn), turn / 2 % 2);
      received(turn, (block_index() + 2) % 3);
      sync_cta();
    }
  });
  verdict("sent in turns", "", [] {
    exchanges_begin();
    for (int turn = 0; turn < 6; turn++) turn_around(turn);
  });
  verdict("sent in turns, read without a barrier before the next", "any", [] {
    exchanges_begin();
    for (int turn = 0; turn < 6; turn++) {
      expect_from(turn, 320);
      send(turn, 1, 1), send(turn, 2, 1);
      arrival_wait_remote(exchange(turn), turn / 2 % 2);
      received(turn, (block_index() + 1) % 3);
    }
  });
  verdict("more is sent than expected", name(ARRIVAL), [] {
    exchanges_begin();
    expect_from(0, 144);
    send(0, 1, 1);
    cluster_barrier();
    arrival_wait_remote(exchange(0), 0);
  });
  verdict("less is sent than expected", "any", [] {  // it is waited for in vain, and what has come stays on its way
    exchanges_begin();
    expect_from(0, 160);
    send(0, 1, 1, 9);
    arrival_wait_remote(exchange(0), 0);
  });
  verdict("two CTAs send to one place", "any", [] {
    exchanges_begin();
    if (block_index() == 0) expect_from(0, 64);
    if (block_index() > 0 && thread_index() < 2) remote_store(shared_memory() + thread_index() * 16, 0, Bytes16{}, exchange(0));
    if (block_index() == 0) arrival_wait_remote(exchange(0), 0);
  });
  verdict("sent before the other is known to run", "any", [] {  // it may have no barrier yet either
    if (thread_index() == 0) arrival_init(exchange(0));
    expect_from(0, 160);
    send(0, 1, 1);
    arrival_wait_remote(exchange(0), 0);
  });
  verdict("sent when the other may have ended", "any", [] {
    exchanges_begin();
    send(0, 1, 1);
  });
  verdict("beyond the cluster", name(OUT_OF_BOUNDS), [] {
    exchanges_begin();
    remote_store(shared_memory() + thread_index() * 16, 3, Bytes16{}, exchange(0));
  });
  verdict("beyond the other's region", name(OUT_OF_BOUNDS), [] {
    exchanges_begin();
    if (thread_index() == 31)
      remote_store(shared_memory().part(0, 256, "part") + thread_index() * 16, block_index(), Bytes16{}, exchange(0));
  });
  verdict("16 bytes at 8", name(MISALIGNED), [] {
    exchanges_begin();
    if (thread_index() == 3) remote_store(shared_memory() + 8, block_index(), Bytes16{}, exchange(0));
  });
  verdict("to a barrier that is none", name(UNINITIALISED), [] {
    exchanges_begin();
    if (thread_index() == 3) remote_store(shared_memory(), block_index(), Bytes16{}, shared_memory() + 512);
  });
  verdict("one CTA leaves the barrier out", name(DIVERGENCE), [] {
    if (block_index() != 1) cluster_barrier();
  });
  verdict("waits without arriving", name(DIVERGENCE), [] { cluster_wait(); });
  verdict("arrives twice", name(DIVERGENCE), [] {
    cluster_arrive();
    cluster_arrive();
    cluster_wait();
  });
  verdict("ends without waiting", name(DIVERGENCE), [] { cluster_arrive(); });
  verdict("two CTAs at different barriers", name(DIVERGENCE), [] {
    if (block_index() == 0)
      cluster_barrier();
    else
      sync_cta();
  });
}

void bulk_copies() {
  using enum emulator::Kind;
  const auto name = [](emulator::Kind kind) { return emulator::KIND_NAMES[kind]; };
  const auto verdict = [](const char* title, const char* kind, Bulk fault) {
    expect(title, kind, 64, [fault] { bulk_copy(fault); });
  };
  verdict("bulk copies, three phases", "", Bulk::NONE);
  verdict("bulk copy, arrival not initialised", "any", Bulk::NO_INIT);
  verdict("bulk copy, initialised without a proxy fence", name(PROXY), Bulk::NO_FENCE);
  verdict("bulk copy, initialised without a barrier", "any", Bulk::NO_BARRIER);
  verdict("bulk copy, not expected", "any", Bulk::NO_EXPECT);  // nobody ever gets it
  verdict("bulk copy, more than expected", name(ARRIVAL), Bulk::TOO_FEW);
  verdict("bulk copy, less than expected", "any", Bulk::TOO_MANY);
  verdict("bulk copy, expected twice", name(ARRIVAL), Bulk::EXPECTED_TWICE);
  verdict("bulk copy, not waited for", "any", Bulk::NO_WAIT);
  verdict("bulk copy, the other parity waited for", "any", Bulk::OTHER_PARITY);
  verdict("bulk copy, waited for by another thread", "any", Bulk::WAITED_BY_ANOTHER);
  verdict("bulk copy, waited for by another thread and a barrier", "", Bulk::WAITED_BY_ANOTHER_BARRIER);
  verdict("bulk copy over a store", name(PROXY), Bulk::STORED_BEFORE);
  verdict("bulk copy over a store that was shown", "", Bulk::STORED_BEFORE_FENCED);
  verdict("bulk copy over what others still read", name(RACE), Bulk::READ_BEFORE);
  verdict("bulk copy of 120 bytes", "any", Bulk::MISALIGNED_SIZE);
  verdict("bulk copy to byte 8", "any", Bulk::MISALIGNED_PLACE);
  verdict("bulk copy past a buffer", "any", Bulk::PAST_BUFFER);
  verdict("bulk copy past a region", "any", Bulk::PAST_REGION);
}

// Kernels that may begin while the one before them ends, which writes the first 32 words.
void overlapping_kernels() {
  using enum emulator::Kind;
  const auto verdict = [](const char* title, const char* kind, auto kernel) {
    const emulator::Buffer written{"written before", global_words, 128, true, true};
    const emulator::Buffer own{"own", global_words + 32, 128, true};
    expect(title, kind, emulator::Launch{1, 32, 1024, 0, true, {written, own}, 1, true}, kernel);
  };
  const char* const found = emulator::KIND_NAMES[PREDECESSOR];
  static const auto from_before = [] { return global_load<uint32_t>(global_words + thread_index()); };
  static const auto wait = [] { predecessor_wait(), successor_begin(); };
  verdict("read behind the wait for the kernel before", "", [] {
    global_load<uint32_t>(global_words + 32 + thread_index());
    wait();
    if (from_before() != global_words[thread_index()]) failures++;
  });
  verdict("read before the wait", found, [] {
    if (from_before() != ~0u) failures++;  // not there yet
    wait();
  });
  verdict("copied before the wait", found, [] {
    copy_async<4>(word(thread_index()), global_words + thread_index());
    wait();
  });
  verdict("written before the wait", found, [] {
    global_store(global_words + thread_index(), 0u);
    wait();
  });
  verdict("waited for by another thread", found, [] {
    if (thread_index() == 0) wait();
    sync_cta();
    from_before();
    wait();
  });
  verdict("never waited for", found, [] { successor_begin(); });
  verdict("the next kernel begins before the wait", found, [] {
    successor_begin();
    predecessor_wait();
  });
  verdict("the next kernel is not let begin", found, [] { predecessor_wait(); });
  verdict("copied in bulk before the wait", "any", [] {
    const SharedPtr arrival = shared_memory() + 512;
    if (thread_index() == 0) {
      arrival_init(arrival);
      proxy_fence();
      arrival_expect(arrival, 64);
      copy_bulk(shared_memory(), global_words, 64, arrival);
    }
    wait();
    sync_cta();
    arrival_wait(arrival, 0);
  });
  verdict("waited for twice", "", [] {
    predecessor_wait();
    wait();
  });
}
