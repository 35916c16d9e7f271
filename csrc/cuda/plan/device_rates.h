// Rates that the time model counts with, per architecture. Peak figures of the vendor's data sheets but for sm_90, where memory
// and tensor cores were measured; a chip of the same architecture with less memory bandwidth is slower for every path alike.
#pragma once
#include <cstdlib>

namespace res2net_fused::cuda {

struct DeviceRates {
  int capability;       // of the devices that these are the rates of, such as 90
  double clock;         // Hz
  double mma_cycles;    // of a multiprocessor per mma.m16n8k16 (half) or m16n8k8 (TF32), its four tensor cores together
  double wgmma_cycles;  // the same by wgmma, for as many products: 95 % of the peak, a guess; 0 where there is none
  double dram, l2;      // bytes/s
  double launch;        // s: from one kernel of a graph to the next, and a kernel's own start and end
};

inline constexpr DeviceRates KNOWN_RATES[] = {
    {80, 1.41e9, 2.0, 0, 1.7e12, 3.5e12, 2.0e-6},
    {86, 1.70e9, 4.0, 0, 0.7e12, 1.8e12, 2.0e-6},
    {89, 2.20e9, 4.0, 0, 0.9e12, 3.0e12, 2.0e-6},
    {90, 1.70e9, 1.55, 1.05, 4.3e12, 4.6e12, 2.0e-6},  // mma.sync: 62 % of the peak
    {100, 1.85e9, 1.5, 0, 7.0e12, 8.0e12, 2.0e-6},
    // RTX 5090: sums in fp32 at half the rate; L2 as of sm_89, by multiprocessors and clock
    {120, 2.41e9, 8.0, 0, 1.79e12, 4.4e12, 2.0e-6},
};

constexpr int capability_of(int major, int minor) { return 10 * major + minor; }

// Those of the nearest architecture; of two as near, the older one's.
inline const DeviceRates& rates_of(int major, int minor) {
  const DeviceRates* nearest = KNOWN_RATES;
  const auto distance = [&](const DeviceRates& rates) { return std::abs(rates.capability - capability_of(major, minor)); };
  for (const DeviceRates& rates : KNOWN_RATES)
    if (distance(rates) < distance(*nearest)) nearest = &rates;
  return *nearest;
}

}  // namespace res2net_fused::cuda
