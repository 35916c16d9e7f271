// The host build of csrc/cuda/chain/hardware_sm90.h. Products read their operands, and write their sums, as late as they may.
#pragma once

struct SharedMatrix {
  uint64_t descriptor;
  SharedPtr region;  // its bounds alone count: the place is in the descriptor
  SharedMatrix(SharedPtr start, int leading, int stride)
      : descriptor(matrix_descriptor(uint32_t(start.offset), leading, stride)), region(start) {}
  SharedMatrix moved(int units) const {
    SharedMatrix there = *this;
    there.descriptor = (descriptor & ~uint64_t(0xffffffff)) | (uint32_t(descriptor) + uint32_t(units));
    return there;
  }
};

namespace emulator {
int uniform(int value, const Where& where);
void begin_products(Accumulator* const* sums, int tiles, int columns);
void multiply_async(
    Accumulator* c, const SharedMatrix& a, const SharedMatrix& b, int columns, res2net_fused::cuda::DataType type,
    const Where& where);
void commit_products(const Where& where);
void wait_products(int pending, const Where& where);
}  // namespace emulator

inline int uniform(int value, Where where = Where::current()) { return emulator::uniform(value, where); }
inline SharedPtr uniform(SharedPtr place, Where where = Where::current()) {
  emulator::uniform(place.offset, where);
  return place;
}
inline void arrival_wait_together(SharedPtr arrival, int parity, Where where = Where::current()) {
  emulator::uniform(parity, where);
  emulator::arrival_wait(arrival, parity, where);
}

template <int TILES, int COLUMNS>
void products_begin(Accumulator (&sums)[TILES][COLUMNS]) {
  Accumulator* tiles[TILES];
  for (int tile = 0; tile < TILES; tile++) tiles[tile] = sums[tile];
  emulator::begin_products(tiles, TILES, COLUMNS);
}
inline void products_commit(Where where = Where::current()) { emulator::commit_products(where); }
template <int TILES, int COLUMNS>
void products_wait(Accumulator (&)[TILES][COLUMNS], Where where = Where::current()) {
  emulator::wait_products(0, where);
}
inline void products_wait_for_earlier(Where where = Where::current()) { emulator::wait_products(1, where); }
template <class Element, int COLUMNS>
void multiply_async(Accumulator (&c)[COLUMNS], SharedMatrix a, SharedMatrix b, Where where = Where::current()) {
  static_assert(Element::BYTES == 2);
  emulator::multiply_async(c, a, b, COLUMNS, Element::TYPE, where);
}
