// Rates that the time model counts with, per architecture. Peak figures of the vendor's data sheets but for sm_90, where memory
// and tensor cores were measured; a chip of the same architecture with less memory bandwidth is slower for every path alike.
#pragma once

namespace res2net_fused::chain {

struct DeviceRates {
  double clock;         // Hz
  double mma_cycles;    // a multiprocessor's cycles per mma.m16n8k16 in half precision or m16n8k8 in TF32, its four tensor cores together
  double wgmma_cycles;  // the same by wgmma, for as many products: 95 % of the peak, a guess; 0 where there is none
  double dram, l2;      // bytes/s
  double launch;        // s: from one kernel of a graph to the next, and a kernel's own start and end
};

inline DeviceRates rates_of(int major, int minor) {
  const int capability = 10 * major + minor;
  if (capability >= 100) return {1.85e9, 1.5, 0, 7.0e12, 8.0e12, 2.0e-6};
  if (capability >= 90) return {1.70e9, 1.55, 1.05, 4.3e12, 4.6e12, 2.0e-6};  // mma.sync: 62 % of the peak
  if (capability >= 89) return {2.20e9, 4.0, 0, 0.9e12, 3.0e12, 2.0e-6};
  if (capability >= 86) return {1.70e9, 4.0, 0, 0.7e12, 1.8e12, 2.0e-6};
  return {1.41e9, 2.0, 0, 1.7e12, 3.5e12, 2.0e-6};
}

}  // namespace res2net_fused::chain
