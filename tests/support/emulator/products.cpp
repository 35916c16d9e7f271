// wgmma on the host. A product waits in a list until its warpgroup waits for it: only then its operands are read and its sums
// appear. Until then the sums hold NaN, and whatever was written to an operand since is a race.
#include "state.h"

#include "cuda/chain/hardware_sm90.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace emulator {
namespace {
constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int ROWS = 64;

struct Matrix {
  int start, leading, stride, rows;
  SharedPtr region;
  // The place of 16 bytes of a row: the first or the second half of K.
  int place(int row, int half) const { return start + half * leading + row / 8 * stride + row % 8 * 16; }
};

struct Product {
  Matrix a, b;
  Accumulator* key;  // thread 0's sums, which stand for those of all threads
  bool is_bf16;
  uint64_t number;  // counts the launch's products
  uint64_t writes;  // until it was issued
  uint32_t epoch;   // of the CTA then
  Where where;
};

struct Sums {
  int columns;
  int pending = 0;                  // products
  std::vector<Accumulator*> owner;  // per thread
  std::vector<float> value;         // ROWS x 8 * columns
  float& at(int thread, int j, int i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8;
    return value[row * 8 * columns + j * 8 + thread % 4 * 2 + i % 2];
  }
};

// One statement that several threads have to reach together.
struct Meeting {
  const char* operation = nullptr;
  uint32_t line = 0;
  std::vector<Fiber*> arrived;
};

struct Warpgroup {
  Meeting meeting;
  std::vector<Accumulator*> arriving;  // sums of the product that they meet for
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;  // in groups, the oldest first
  std::map<Accumulator*, Sums> sums;           // of products that are not finished
  uint64_t finished = 0;                       // the last product that is
};

// What a thread's sums were when products_begin was called.
struct Snapshot {
  Accumulator* sums = nullptr;
  std::vector<Accumulator> value;
};

uint64_t product_number;
std::vector<Warpgroup> groups;
std::vector<Meeting> warps;                    // for `uniform`
std::vector<int> agreed;                       // per warp
std::vector<std::vector<Snapshot>> snapshots;  // per thread

Warpgroup& group_of(const Fiber& fiber) { return groups[fiber.number / GROUP]; }
Fiber* first_thread() { return &fibers[current->number / GROUP * GROUP]; }

// True in the thread that arrives last, for which the others wait.
bool meet(Meeting& meeting, const char* operation, const Where& where, size_t threads = GROUP) {
  if (launch.threads % threads) {
    finding(DIVERGENCE, where, "%s in a CTA of %d threads, which are no whole warpgroups", operation, launch.threads);
    give_up();
  }
  if (meeting.arrived.empty()) {
    meeting.operation = operation;
    meeting.line = where.line();
  } else if (meeting.operation != operation || meeting.line != where.line()) {
    finding(DIVERGENCE, where, "is here while others beside it are at %s of line %u", meeting.operation, meeting.line);
    give_up();
  }
  meeting.arrived.push_back(current);
  if (meeting.arrived.size() < threads) {
    suspend(operation, where);
    return false;
  }
  for (Fiber* fiber : meeting.arrived)
    if (fiber != current) wake(*fiber);
  meeting.arrived.clear();
  return true;
}

Matrix decode(const SharedMatrix& matrix, int rows, const Where& where) {
  const auto field = [&](int bit) { return int(matrix.descriptor >> bit & 0x3fff) * 16; };
  Matrix decoded{field(0), field(16), field(32), rows, matrix.region};
  if (matrix.descriptor & ~0x3fff3fff3fffull)
    finding(
        MISALIGNED, where, "matrix descriptor %llx has other bits than those of its fields",
        (unsigned long long)matrix.descriptor);
  const SharedPtr& region = matrix.region;
  for (int row = 0; row < rows; row += 8)
    for (int half = 0; half < 2; half++) {
      const int place = decoded.place(row, half);
      if (place >= region.begin && place + 128 <= region.end && region.end <= launch.shared_bytes) continue;
      finding(
          OUT_OF_BOUNDS, where, "matrix with rows %d to %d at byte %d of %s, which has %d", row, row + 7, place - region.begin,
          region.region, region.end - region.begin);
      decoded.rows = 0;  // not read
    }
  return decoded;
}

// Calls `visit` with the place of every 16 bytes of some rows.
template <class Visit>
void for_each_place(const Matrix& matrix, int first, int rows, Visit visit) {
  for (int row = first; row < std::min(first + rows, matrix.rows); row++)
    for (int half = 0; half < 2; half++) visit(matrix.place(row, half));
}

// Records that `reader` reads rows of the matrix from now on, if not before.
void check_matrix(const Matrix& matrix, int first, int rows, Fiber* reader, bool all_warps, const Product& product) {
  const Where& where = product.where;
  Fiber* const self = current;
  current = reader;
  for_each_place(matrix, first, rows, [&](int place) {
    SharedPtr bytes = matrix.region;
    bytes.offset = place;
    check_read(bytes, 16, where, product.number);
    for (int at = place; at < place + 16; at += GRANULE) {
      Granule& granule = ctas[current->rank].granules[at / GRANULE];
      granule.several_warps |= all_warps;
      if (!shown(granule))
        finding(
            PROXY, where, "multiplies byte %d of %s, written in line %u with no proxy fence behind", at - bytes.begin,
            bytes.region, granule.write_line);
    }
  });
  current = self;
}

// A warp reads its rows of A, and all of B.
void check_operands(const Product& product) {
  Fiber* const threads = first_thread();
  for (int warp = 0; warp < 4; warp++) check_matrix(product.a, warp * 16, 16, threads + warp * 32, false, product);
  check_matrix(product.b, 0, product.b.rows, threads, true, product);
}

// Whether anything of the matrix was written since the product was issued.
void check_unchanged(const Matrix& matrix, const Product& product) {
  for_each_place(matrix, 0, matrix.rows, [&](int place) {
    for (int at = place; at < place + 16; at += GRANULE) {
      const Granule& granule = ctas[current->rank].granules[at / GRANULE];
      if (granule.write_epoch >= first_epoch && granule.write_number > product.writes)
        finding(
            RACE, product.where, "multiplies byte %d of %s, overwritten in line %u before the product was waited for",
            at - matrix.region.begin, matrix.region.region, granule.write_line);
    }
  });
}

void perform(const Product& product, Sums& sums) {
  if (launch.checks) {
    check_unchanged(product.a, product);
    check_unchanged(product.b, product);
    if (ctas[current->rank].epoch != product.epoch) check_operands(product);  // they have been read in this epoch too
  }
  const std::vector<unsigned char>& memory = ctas[current->rank].memory;
  const int columns = 8 * sums.columns;
  const auto widen = [&](const Matrix& matrix, std::vector<float>& values) {
    for (int row = 0; row < matrix.rows; row++)
      for (int k = 0; k < 16; k++) {
        uint16_t bits;
        std::memcpy(&bits, &memory[matrix.place(row, k / 8) + k % 8 * 2], 2);
        values[row * 16 + k] = product.is_bf16 ? widen_bf16(bits) : widen_fp16(bits);
      }
  };
  std::vector<float> a(ROWS * 16, NAN), b(columns * 16, NAN), transposed(16 * columns);
  widen(product.a, a);
  widen(product.b, b);
  for (int k = 0; k < 16; k++)
    for (int column = 0; column < columns; column++) transposed[k * columns + column] = b[column * 16 + k];
  for (int row = 0; row < ROWS; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < columns; column++)
        sums.value[row * columns + column] += a[row * 16 + k] * transposed[k * columns + column];
}
}  // namespace

int uniform(int value, const Where& where) {
  const int warp = current->warp;
  if (warps[warp].arrived.empty()) agreed[warp] = value;
  if (agreed[warp] != value)
    finding(DIVERGENCE, where, "%d is said to be uniform, but another lane has %d", value, agreed[warp]);
  meet(warps[warp], "a uniform value", where, 32);
  return value;
}

void begin_products(Accumulator* const* sums, int tiles, int columns) {
  auto& taken = snapshots[current->number];
  taken.resize(tiles);
  for (int tile = 0; tile < tiles; tile++) {
    taken[tile].sums = sums[tile];
    taken[tile].value.assign(sums[tile], sums[tile] + columns);
  }
}

void multiply_async(
    Accumulator* c, const SharedMatrix& a, const SharedMatrix& b, int columns, res2net_fused::cuda::DataType type,
    const Where& where) {
  Warpgroup& group = group_of(*current);
  bool begun = false;
  for (const Snapshot& snapshot : snapshots[current->number])
    begun |= snapshot.sums == c && std::memcmp(c, snapshot.value.data(), columns * sizeof *c) == 0;
  bool running = false;  // of sums that no thread may have touched since, the hardware keeps the order
  for (const auto& [key, sums] : group.sums) running |= sums.owner[current->number % GROUP] == c;
  if (!begun && !running) finding(IN_FLIGHT, where, "adds to sums that were used since products_begin, or without it");
  group.arriving.resize(GROUP);
  group.arriving[current->number % GROUP] = c;
  if (!meet(group.meeting, "a product", where)) return;
  const std::vector<Accumulator*> owner = group.arriving;
  const auto [place, fresh] = group.sums.try_emplace(owner[0]);
  Sums& sums = place->second;
  if (fresh) {
    sums.columns = columns;
    sums.owner = owner;
    sums.value.resize(ROWS * 8 * columns);
    for (int thread = 0; thread < GROUP; thread++)
      for (int j = 0; j < columns; j++)
        for (int i = 0; i < 4; i++) {
          sums.at(thread, j, i) = owner[thread][j].value[i];
          owner[thread][j].value[i] = NAN;
        }
  }
  sums.pending++;
  report.multiplies += 4 * columns;
  const Product product{
      decode(a, ROWS, where), decode(b, 8 * columns, where), owner[0], type == res2net_fused::cuda::BF16, ++product_number,
      write_number,           ctas[current->rank].epoch,     where};
  if (launch.checks) check_operands(product);
  group.open.push_back(product);
}

void commit_products(const Where& where) {
  Warpgroup& group = group_of(*current);
  if (!meet(group.meeting, "a commit of products", where)) return;
  group.committed.emplace_back();
  group.committed.back().swap(group.open);
}

void wait_products(int pending, const Where& where) {
  Warpgroup& group = group_of(*current);
  for (Snapshot& snapshot : snapshots[current->number]) snapshot.sums = nullptr;
  const bool last = meet(group.meeting, "a wait for products", where);
  for (; last && int(group.committed.size()) > pending; group.committed.pop_front())
    for (const Product& product : group.committed.front()) {
      Sums& sums = group.sums.at(product.key);
      perform(product, sums);
      group.finished = product.number;
      if (--sums.pending > 0) continue;
      for (int thread = 0; thread < GROUP; thread++)
        for (int j = 0; j < sums.columns; j++)
          for (int i = 0; i < 4; i++) sums.owner[thread][j].value[i] = sums.at(thread, j, i);
      group.sums.erase(product.key);
    }
  // Each warp knows of its own part alone.
  current->finished.resize(launch.threads / 32);
  current->finished[current->thread / 32] = group.finished;
}

bool products_pending() { return !group_of(*current).sums.empty(); }

void prepare_products() {
  warps.assign(fibers.size() / 32, {});
  agreed.assign(fibers.size() / 32, 0);
  groups.assign((fibers.size() + GROUP - 1) / GROUP, {});
  snapshots.assign(fibers.size(), {});
}
}  // namespace emulator
