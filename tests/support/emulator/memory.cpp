// Shared and global memory of the emulated kernel, with the checks of every access.
#include "state.h"

#include <algorithm>
#include <cstdlib>

namespace emulator {
std::vector<Writers> writers;
uint64_t write_number;

bool in_region(SharedPtr pointer, int bytes, const char* what, const Where& where) {
  bool good = true;
  if (pointer.offset < pointer.begin || pointer.offset + bytes > pointer.end || pointer.end > launch.shared_bytes) {
    finding(
        OUT_OF_BOUNDS, where, "%s of %d bytes at byte %d of %s, which has %d", what, bytes, pointer.offset - pointer.begin,
        pointer.region, pointer.end - pointer.begin);
    good = false;
  }
  if (pointer.offset % bytes) {
    finding(MISALIGNED, where, "%s of %d bytes at byte %d of shared memory", what, bytes, pointer.offset);
    good = false;
  }
  return good;
}

namespace {
// Whether a barrier lies between an access by thread `other` and the current thread.
bool ordered(int other, uint32_t other_epoch, uint32_t other_warp_epoch, int other_phase) {
  const Fiber& left = fibers[other];
  if (left.number == current->number || other_phase < current->waits) return true;
  if (left.rank == current->rank && other_epoch < ctas[left.rank].epoch) return true;
  if (left.rank != current->rank && other_epoch < current->known[left.rank]) return true;
  return left.warp == current->warp && other_warp_epoch < warp_epoch[left.warp];
}

void record_write(Granule& granule) {
  granule.write_epoch = ctas[current->rank].epoch;
  granule.write_warp_epoch = warp_epoch[current->warp];
  granule.write_phase = current->arrivals;
  granule.writer = int16_t(current->number);
  granule.write_number = ++write_number;
  granule.phase_number = 0;
}

// Whether the current thread has itself waited for the bulk copy that wrote this.
bool arrived(const Granule& granule) {
  if (granule.phase_number == 0) return false;
  const auto seen = current->phases.find(granule.arrival);
  return seen != current->phases.end() && seen->second >= granule.phase_number;
}

bool after_all_reads(const Granule& granule, const Cta& cta) {
  if (granule.read_epoch < first_epoch || granule.read_phase < current->waits) return true;
  if (&cta != &ctas[current->rank]) return granule.read_epoch < current->known[&cta - ctas.data()];
  if (granule.read_epoch < cta.epoch) return true;
  if (granule.by_products) {
    const auto& finished = current->finished;
    for (size_t warp = 0; warp < size_t(launch.threads) / 32; warp++)
      if (granule.products[warp / 4] > (warp < finished.size() ? finished[warp] : 0)) return false;
    return true;
  }
  return !granule.several_warps && ordered(granule.reader, granule.read_epoch, granule.read_warp_epoch, granule.read_phase) &&
         !(granule.several_lanes && granule.read_warp_epoch >= warp_epoch[current->warp]);
}

void check_write(Cta& cta, SharedPtr to, int bytes, const Where& where) {
  for (int at = to.offset; at < to.offset + bytes; at += GRANULE) {
    Granule& granule = cta.granules[at / GRANULE];
    const int place = at - to.begin;
    if (granule.in_flight)
      finding(
          IN_FLIGHT, where, "writes byte %d of %s before the copy of line %u was waited for", place, to.region,
          granule.write_line);
    else if (
        granule.write_epoch >= first_epoch && !arrived(granule) &&
        !ordered(granule.writer, granule.write_epoch, granule.write_warp_epoch, granule.write_phase))
      finding(
          RACE, where, "writes byte %d of %s of block %d, written by thread %d of block %d in line %u with no barrier between",
          place, to.region, cta.block, fibers[granule.writer].thread, ctas[fibers[granule.writer].rank].block,
          granule.write_line);
    else if (!after_all_reads(granule, cta))
      finding(
          RACE, where, "writes byte %d of %s of block %d, read by its thread %d in line %u with no barrier between", place,
          to.region, cta.block, fibers[granule.reader].thread, granule.read_line);
    record_write(granule);
    granule.write_line = where.line();
  }
}

// The index of a buffer that this thread may touch, else -1.
int ours(int buffer, const char* what, const Where& where) {
  const Buffer& touched = launch.buffers[buffer];
  if (!touched.predecessors || current->awaited) return buffer;
  finding(PREDECESSOR, where, "%s of %s before the kernel before has ended", what, touched.name);
  return -1;
}

// The index of the buffer that holds these bytes, or -1, as also where the kernel before is still at it. Where x and out lie between each other's elements, both do: writes
// go to the one that may be written.
int find_buffer(const void* address, int bytes, int alignment, const char* what, const Where& where, bool writes = false) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  if (place % alignment) {
    finding(MISALIGNED, where, "%s of %d bytes of global memory", what, alignment);
    return -1;
  }
  int read_only = -1;
  for (size_t i = 0; i < launch.buffers.size(); i++) {
    const auto begin = reinterpret_cast<uintptr_t>(launch.buffers[i].begin);
    if (place < begin || place + bytes > begin + launch.buffers[i].bytes) continue;
    if (!writes || launch.buffers[i].writable) return ours(int(i), what, where);
    read_only = int(i);
  }
  if (read_only >= 0) return ours(read_only, what, where);
  const Buffer* nearest = nullptr;
  int64_t nearest_offset = 0;
  for (const Buffer& buffer : launch.buffers) {
    const int64_t offset = int64_t(place - reinterpret_cast<uintptr_t>(buffer.begin));
    if (!nearest || std::llabs(offset) < std::llabs(nearest_offset)) nearest = &buffer, nearest_offset = offset;
  }
  finding(
      OUT_OF_BOUNDS, where, "%s of %d bytes outside every buffer, at byte %lld of %s", what, bytes, (long long)nearest_offset,
      nearest ? nearest->name : "nothing");
  return -1;
}

void finish_copies(std::vector<Copy>& copies) {
  Cta& cta = ctas[current->rank];
  for (const Copy& copy : copies) {
    std::memcpy(&cta.memory[copy.offset], copy.data, copy.bytes);
    for (int at = copy.offset; launch.checks && at < copy.offset + copy.bytes; at += GRANULE) {
      cta.granules[at / GRANULE].in_flight = false;
      record_write(cta.granules[at / GRANULE]);
    }
  }
  copies.clear();
}
}  // namespace

void check_read(SharedPtr from, int bytes, const Where& where, uint64_t product) {
  Cta& cta = ctas[current->rank];
  for (int at = from.offset; at < from.offset + bytes; at += GRANULE) {
    Granule& granule = cta.granules[at / GRANULE];
    const int place = at - from.begin;
    if (granule.in_flight)
      finding(
          IN_FLIGHT, where, "reads byte %d of %s before the copy of line %u was waited for", place, from.region,
          granule.write_line);
    else if (granule.write_epoch < first_epoch)
      finding(UNINITIALISED, where, "reads byte %d of %s, which nobody wrote", place, from.region);
    else if (!arrived(granule) && !ordered(granule.writer, granule.write_epoch, granule.write_warp_epoch, granule.write_phase))
      finding(
          RACE, where, "reads byte %d of %s, written by thread %d of block %d in line %u with no barrier between", place,
          from.region, fibers[granule.writer].thread, ctas[fibers[granule.writer].rank].block, granule.write_line);
    if (granule.read_epoch < first_epoch) granule.read_phase = 0;
    if (granule.read_epoch != cta.epoch) {
      granule.read_epoch = cta.epoch;
      granule.several_lanes = granule.several_warps = false;
      granule.by_products = true;
      std::fill(std::begin(granule.products), std::end(granule.products), 0);
    } else if (granule.reader != current->number) {
      (fibers[granule.reader].warp == current->warp ? granule.several_lanes : granule.several_warps) = true;
    }
    granule.by_products &= product > 0;
    if (product > 0) granule.products[current->thread / 128] = product;
    granule.reader = int16_t(current->number);
    granule.read_warp_epoch = warp_epoch[current->warp];
    granule.read_phase = std::max(granule.read_phase, current->arrivals);
    granule.read_line = where.line();
  }
}

bool shown(const Granule& granule) {
  return granule.write_epoch < first_epoch || granule.phase_number > 0 || granule.write_number <= fibers[granule.writer].shown;
}

// A CTA may end as soon as all its threads have waited for their last barrier of the cluster: what others stored there has to
// come before it.
void check_end() {
  for (size_t rank = 0; rank < ctas.size(); rank++)
    for (const auto& [place, arrival] : ctas[rank].arrivals) {
      if (arrival.copies.empty()) continue;
      current = &fibers[rank * launch.threads];
      finding(IN_FLIGHT, current->where, "ends with bulk copies in flight (last seen here)");
    }
  for (size_t rank = 0; rank < ctas.size() && ctas.size() > 1; rank++) {
    int waits = 0;
    for (const Fiber& fiber : fibers)
      if (fiber.rank == int(rank)) waits = std::max(waits, fiber.waits);
    for (const Granule& granule : ctas[rank].granules) {
      if (granule.write_epoch < first_epoch || granule.write_phase < waits) continue;
      if (fibers[granule.writer].rank == int(rank)) continue;
      current = &fibers[granule.writer];
      finding(
          LIFETIME, current->where, "stores in line %u to block %d, which may have ended", granule.write_line,
          ctas[rank].block);
    }
  }
}

void prepare_memory() {
  ctas.resize(launch.cluster);
  for (Cta& cta : ctas) {
    cta.memory.assign(launch.shared_bytes, 0);
    cta.granules.assign((launch.shared_bytes + GRANULE - 1) / GRANULE, {});
  }
  write_number = 0;
  writers.assign(launch.buffers.size(), {});
}

void read_shared(SharedPtr from, void* to, int bytes, const Where& where) {
  if (launch.checks) {
    std::memset(to, 0xff, bytes);
    if (!in_region(from, bytes, "load", where)) return;
    check_read(from, bytes, where);
  }
  std::memcpy(to, &ctas[current->rank].memory[from.offset], bytes);
}

void write_shared(SharedPtr to, const void* from, int bytes, const Where& where) {
  if (launch.checks) {
    if (!in_region(to, bytes, "store", where)) return;
    check_write(ctas[current->rank], to, bytes, where);
  }
  std::memcpy(&ctas[current->rank].memory[to.offset], from, bytes);
}

void read_global(const void* from, void* to, int bytes, const Where& where) {
  std::memset(to, 0xff, bytes);
  if (launch.checks && find_buffer(from, bytes, bytes, "load", where) < 0) return;
  std::memcpy(to, from, bytes);
}

void write_global(void* to, const void* from, int bytes, const Where& where) {
  if (launch.checks) {
    const int index = find_buffer(to, bytes, bytes, "store", where, true);
    if (index < 0) return;
    const Buffer& buffer = launch.buffers[index];
    if (!buffer.writable) {
      finding(OUT_OF_BOUNDS, where, "store to %s, which is read-only", buffer.name);
      return;
    }
    const auto offset = static_cast<const char*>(to) - static_cast<const char*>(buffer.begin);
    const int self = ctas[current->rank].block * launch.threads + current->thread;
    for (int64_t at = offset / GRANULE; at < (offset + bytes) / GRANULE; at++) {
      int& writer = writers[index].of(at);
      if (writer >= 0 && writer != self)
        finding(
            RACE, where, "stores byte %lld of %s, which thread %d of block %d stored too", (long long)(at * GRANULE),
            buffer.name, writer % launch.threads, writer / launch.threads);
      writer = self;
    }
  }
  std::memcpy(to, from, bytes);
}

void start_copy(SharedPtr to, const void* from, int bytes, int valid, const Where& where) {
  Copy copy{to.offset, bytes, {}};
  if (launch.checks) {
    if (!in_region(to, bytes, "copy", where)) return;
    // Where nothing is read, the address may be any that is aligned.
    if (valid > 0 && find_buffer(from, valid, bytes, "copy", where) < 0) return;
    if (reinterpret_cast<uintptr_t>(from) % bytes)
      return finding(MISALIGNED, where, "copy of %d bytes of global memory", bytes);
    check_write(ctas[current->rank], to, bytes, where);
    std::vector<Granule>& granules = ctas[current->rank].granules;
    for (int at = to.offset; at < to.offset + bytes; at += GRANULE) granules[at / GRANULE].in_flight = true;
  }
  std::memcpy(copy.data, from, valid);                               // zeros follow
  std::memset(&ctas[current->rank].memory[to.offset], 0xff, bytes);  // the data arrives as late as it may
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

void proxy_fence() { current->shown = write_number; }

namespace {
// The barrier there, which somebody has made, or nullptr.
Arrival* arrival_at(SharedPtr place, const Where& where) {
  Cta& cta = ctas[current->rank];
  const auto found = cta.arrivals.find(place.offset);
  if (found == cta.arrivals.end()) {
    finding(UNINITIALISED, where, "no arrival was initialised at byte %d of %s", place.offset - place.begin, place.region);
    return nullptr;
  }
  if (launch.checks && in_region(place, 8, "arrival", where)) check_read(place, 8, where);
  return &found->second;
}

// What is known after it is learned that so much is: by CTA, or by warp.
template <class Number>
void raise_to(std::vector<Number>& known, const std::vector<Number>& learned) {
  known.resize(std::max(known.size(), learned.size()));
  for (size_t i = 0; i < learned.size(); i++) known[i] = std::max(known[i], learned[i]);
}

// Ends the phase if all that it expects is there; true if it did.
bool end_phase(Arrival& arrival, int place, const Where& where) {
  if (arrival.arrived < arrival.threads || arrival.issued < arrival.expected) return false;
  if (arrival.issued > arrival.expected)
    finding(ARRIVAL, where, "%d bytes arrive where %d are expected", arrival.issued, arrival.expected);
  static uint64_t phases;
  arrival.number = ++phases;
  arrival.finished = arrival.arriving;
  arrival.known.resize(ctas.size());
  Cta& cta = ctas[current->rank];
  for (const Arrival::Copy& copy : arrival.copies) {
    arrival.known[copy.sender] = std::max(arrival.known[copy.sender], copy.epoch);
    std::memcpy(&cta.memory[copy.offset], copy.data.data(), copy.data.size());
    for (int at = copy.offset; launch.checks && at < copy.offset + int(copy.data.size()); at += GRANULE) {
      Granule& granule = cta.granules[at / GRANULE];
      granule.in_flight = false;
      record_write(granule);
      granule.phase_number = arrival.number, granule.arrival = place;
    }
  }
  arrival.copies.clear();
  arrival.arrived = 0, arrival.expected = arrival.issued = 0, arrival.phase++;
  for (const Fiber* fiber : arrival.waiting) wake(*fiber);
  arrival.waiting.clear();
  return true;
}
}  // namespace

void arrival_init(SharedPtr place, int threads, const Where& where) {
  const uint64_t bits = 0;
  write_shared(place, &bits, 8, where);
  Arrival& arrival = ctas[current->rank].arrivals[place.offset];
  arrival = {};
  arrival.threads = threads;
}

void arrival_signal(SharedPtr place, const Where& where) {
  Arrival* const arrival = arrival_at(place, where);
  if (!arrival) return;
  arrival->arrived++;
  raise_to(arrival->arriving, current->finished);
  end_phase(*arrival, place.offset, where);
}

void arrival_expect(SharedPtr place, int bytes, const Where& where) {
  Arrival* const arrival = arrival_at(place, where);
  if (!arrival) return;
  if (arrival->arrived == arrival->threads) finding(ARRIVAL, where, "arrives a second time in one phase");
  arrival->arrived++, arrival->expected += bytes;
  if (!arrival->waiting.empty()) end_phase(*arrival, place.offset, where);
}

void arrival_wait(SharedPtr place, int parity, const Where& where) {
  Arrival* const arrival = arrival_at(place, where);
  if (!arrival) return;
  if (arrival->phase % 2 == parity && !end_phase(*arrival, place.offset, where)) {
    arrival->waiting.push_back(current);
    suspend("an arrival", where);
  }
  current->phases[place.offset] = arrival->number;
  raise_to(current->known, arrival->known);
  raise_to(current->finished, arrival->finished);
}

void copy_bulk(SharedPtr to, const void* from, int bytes, SharedPtr place, const Where& where) {
  Arrival* const arrival = arrival_at(place, where);
  if (!arrival) return;
  Cta& cta = ctas[current->rank];
  if (launch.checks) {
    if (bytes <= 0 || bytes % 16) return finding(MISALIGNED, where, "bulk copy of %d bytes", bytes);
    SharedPtr last = to + (bytes - 16);
    if (!in_region(to, 16, "bulk copy", where) || !in_region(last, 16, "bulk copy", where)) return;
    if (find_buffer(from, bytes, 16, "bulk copy", where) < 0) return;
    if (!shown(cta.granules[place.offset / GRANULE]))
      finding(PROXY, where, "copies to an arrival that was initialised with no proxy fence behind");
    for (int at = to.offset; at < to.offset + bytes; at += GRANULE)
      if (!shown(cta.granules[at / GRANULE]))
        finding(
            PROXY, where, "copies over byte %d of %s, written in line %u with no proxy fence behind", at - to.begin, to.region,
            cta.granules[at / GRANULE].write_line);
    check_write(cta, to, bytes, where);
    for (int at = to.offset; at < to.offset + bytes; at += GRANULE) cta.granules[at / GRANULE].in_flight = true;
  }
  const auto* const data = static_cast<const unsigned char*>(from);
  arrival->copies.push_back({to.offset, {data, data + bytes}, current->rank, cta.epoch});
  std::memset(&cta.memory[to.offset], 0xff, bytes);
  arrival->issued += bytes;
  if (!arrival->waiting.empty()) end_phase(*arrival, place.offset, where);
}

void remote_store(SharedPtr to, int rank, Bytes16 value, SharedPtr place, const Where& where) {
  if (rank < 0 || rank >= launch.cluster) {
    finding(OUT_OF_BOUNDS, where, "store to CTA %d of a cluster of %d", rank, launch.cluster);
    return;
  }
  Cta& cta = ctas[rank];
  if (launch.checks) {
    if (!in_region(to, sizeof value, "remote store", where)) return;
    if (rank != current->rank && current->waits == 0)
      finding(LIFETIME, where, "stores to block %d before a barrier of the cluster shows that it runs", cta.block);
    if (cta.done == launch.threads) finding(LIFETIME, where, "stores to block %d, which has ended", cta.block);
  }
  const auto found = cta.arrivals.find(place.offset);
  if (found == cta.arrivals.end()) {
    finding(
        UNINITIALISED, where, "block %d has no arrival at byte %d of %s", cta.block, place.offset - place.begin, place.region);
    return;
  }
  if (launch.checks) {
    check_write(cta, to, sizeof value, where);
    for (int at = to.offset; at < to.offset + int(sizeof value); at += GRANULE) cta.granules[at / GRANULE].in_flight = true;
  }
  Arrival& arrival = found->second;
  const auto* const data = reinterpret_cast<const unsigned char*>(&value);
  arrival.copies.push_back({to.offset, {data, data + sizeof value}, current->rank, ctas[current->rank].epoch});
  std::memset(&cta.memory[to.offset], 0xff, sizeof value);
  arrival.issued += sizeof value;
  if (arrival.waiting.empty()) return;
  Fiber* const self = current;
  current = arrival.waiting.front();  // for whom it ends
  end_phase(arrival, place.offset, where);
  current = self;
}
}  // namespace emulator
