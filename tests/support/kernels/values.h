// Random values that are the same everywhere, and the comparison with float64 of what kernels computed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

  // Evenly between -1 and 1.
  float value() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) / 2147483648.0f;
  }
  Floats values(int64_t count, float scale = 1) {
    Floats found(static_cast<size_t>(count));
    for (float& x : found) x = scale * value();
    return found;
  }

 private:
  uint64_t state_;
};

// One kernel set's comparisons.
struct Report {
  std::string set;
  int comparisons = 0, misses = 0;
  double worst = 0;  // error over its bound

  // expected is in float64; what is not finite there must be the same here.
  void compare(const std::string& name, const float* got, const Doubles& expected, double bound) {
    comparisons++;
    double largest = 0;
    bool same = true;
    for (size_t i = 0; i < expected.size(); i++) {
      if (std::isfinite(expected[i])) {
        const double error = std::abs(static_cast<double>(got[i]) - expected[i]);
        if (!(error <= largest)) largest = error;
      } else {
        same &= std::isnan(expected[i]) ? std::isnan(got[i]) : static_cast<double>(got[i]) == expected[i];
      }
    }
    if (largest / bound > worst) worst = largest / bound;
    if (same && largest <= bound) return;
    misses++;
    std::printf(
        "MISS %s, %s: error %.3g, allowed %.3g%s\n", set.c_str(), name.c_str(), largest, bound,
        same ? "" : "; values that are not finite differ");
  }

  void require(const std::string& name, bool holds) {
    comparisons++;
    if (holds) return;
    misses++;
    std::printf("MISS %s, %s\n", set.c_str(), name.c_str());
  }
};
