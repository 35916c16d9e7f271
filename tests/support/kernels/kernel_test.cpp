// The CPU kernels of every instruction set of this processor, compared with float64; needs no PyTorch.
//
//   kernel_test          every set; exits with 1 where a comparison fails
//   kernel_test SET      that one, which must be the processor's best
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/chain/forward.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/work_split.h"
#include "reference.h"

bool test_sharing();  // sharing_test.cpp

namespace {

constexpr double kRounding = 6e-6;  // of a sum's largest terms: what Winograd's transforms lose, and half of it once more

size_t as_size(int64_t n) { return static_cast<size_t>(n); }

// A convolution's weights that leave values of about the size that they have.
ChainWeights random_weights(const ChainProblem& p, Random& random) {
  ChainWeights made;
  const float scale = 1.0f / std::sqrt(9.0f * static_cast<float>(p.channels / p.groups));
  for (int64_t i = 0; i < p.steps; i++) {
    made.weights.push_back(random.values(p.channels * p.channels / p.groups * 9, 2 * scale));
    made.biases.push_back(random.values(p.channels));
  }
  return made;
}

// What run_chain takes, packed by the kernels themselves.
struct Packed {
  Floats winograd, direct, bias;

  Packed(const Kernels& kernels, const ChainProblem& p, const ChainWeights& from)
      : winograd(as_size(winograd_covers(p) ? p.steps * winograd_floats(p.channels) : 0)),
        direct(as_size(p.steps * p.groups * direct_group_floats(p.channels / p.groups))),
        bias(as_size(p.steps * bias_floats(p.channels))) {
    const int64_t each = p.groups * direct_group_floats(p.channels / p.groups);
    for (int64_t i = 0; i < p.steps; i++) {
      const float* const weight = from.weights[as_size(i)].data();
      const int64_t panels = p.groups * panel_count(p.channels / p.groups);
      kernels.pack_direct(weight, p.channels, p.groups, direct.data() + i * each, 0, panels);
      if (!winograd.empty()) {
        const WeightView view{weight, p.channels * 9, 9, 3, 1};
        float* const to = winograd.data() + i * winograd_floats(p.channels);
        kernels.pack_winograd(view, p.channels, to, winograd_point(p.channels), 0, panel_count(p.channels));
      }
      std::copy(from.biases[as_size(i)].begin(), from.biases[as_size(i)].end(), bias.begin() + i * bias_floats(p.channels));
    }
  }
};

Floats run(
    const Kernels& kernels, const ChainProblem& p, const Floats& x, const Packed& packed, ArithmeticChoice choice,
    int64_t threads) {
  const int64_t wide = p.scale() * p.channels;
  Floats out(as_size(p.batch * p.out_height() * p.out_width() * wide), std::numeric_limits<float>::quiet_NaN());
  ChainData data{};
  data.x = {x.data(), p.height * p.width * wide, p.width * wide, wide};
  data.out = {out.data(), p.out_height() * p.out_width() * wide, p.out_width() * wide, wide};
  data.room = wide;
  data.winograd = packed.winograd.empty() ? nullptr : packed.winograd.data();
  data.direct = packed.direct.data();
  data.bias = packed.bias.data();
  const ChainPlan plan = plan_chain(p, data.winograd == nullptr ? ArithmeticChoice::direct : choice, threads);
  run_chain(p, plan, data, kernels);
  return out;
}

void test_chain(const Kernels& kernels, Report& report, const ChainProblem& p, bool infinite = false) {
  Random random(as_size(p.channels * 1000 + p.height * 10 + p.stride));
  Floats x = random.values(p.batch * p.height * p.width * p.scale() * p.channels, 2);
  if (infinite) {
    x[3] = std::numeric_limits<float>::quiet_NaN();
    x[x.size() / 2] = std::numeric_limits<float>::infinity();
  }
  const ChainWeights weights = random_weights(p, random);
  const Packed packed(kernels, p, weights);
  const Doubles expected = ReferenceChain(p, x, weights).run();
  const std::string name = "chain of " + std::to_string(p.channels) + " channels, " + std::to_string(p.height) + " x " +
                           std::to_string(p.width) + ", activation " + std::to_string(p.activation.kind);
  const double bound = kRounding * static_cast<double>(8 * p.steps);
  for (const auto choice : {ArithmeticChoice::winograd, ArithmeticChoice::direct}) {
    for (const int64_t threads : {1, 3})
      report.compare(name, run(kernels, p, x, packed, choice, threads).data(), expected, bound);
  }
}

void test_chains(const Kernels& kernels, Report& report) {
  const ChainProblem usual{2, 7, 9, 8, 3, 1, 1, 1, true, Passthrough::last, Pool::none, {Activation::relu}};
  for (const int64_t channels : {1, 3, 8, 13, 24, 26, 40}) {
    ChainProblem p = usual;
    p.channels = channels;
    test_chain(kernels, report, p);
    if (channels > 3) test_chain(kernels, report, p, true);
  }
  for (int64_t kind = Activation::relu; kind <= Activation::mish; kind++) {
    ChainProblem p = usual;
    p.channels = 14;
    p.activation = {static_cast<Activation::Kind>(kind), 0.1f};
    test_chain(kernels, report, p);
  }
  for (const auto passthrough : {Passthrough::none, Passthrough::first, Passthrough::first_added}) {
    ChainProblem p = usual;
    p.passthrough = passthrough;
    test_chain(kernels, report, p);
  }
  for (const auto pool : {Pool::avg3, Pool::avg3_nopad}) {
    ChainProblem p = usual;
    p.pool = pool;
    p.stride = 2;
    p.hierarchical = false;
    p.channels = 11;
    test_chain(kernels, report, p);
  }
  for (const int64_t size : {1, 2, 3, 5, 6}) {
    ChainProblem p = usual;
    p.height = p.width = size;
    p.dilation = size == 3 ? 2 : 1;
    p.groups = size == 5 ? 2 : 1;
    p.channels = 100;
    p.steps = 2;
    test_chain(kernels, report, p);
  }
}

// relu(source * weights + bias + shortcut), rows of pixels.
void test_pointwise(const Kernels& kernels, Report& report, int64_t rows, int64_t depth, int64_t columns) {
  Random random(as_size(depth));
  const Floats source = random.values(rows * depth),
               weights = random.values(columns * depth, 1.0f / std::sqrt(static_cast<float>(depth)));
  const Floats shortcut = random.values(rows * columns), plain_bias = random.values(columns);
  Floats packed(as_size(pointwise_floats(columns, depth))), bias(as_size(bias_floats(columns))), out(as_size(rows * columns));
  kernels.pack_pointwise(weights.data(), columns, depth, packed.data(), 0, panel_count(columns));
  std::copy(plain_bias.begin(), plain_bias.end(), bias.begin());
  Pointwise p{};
  p.sources[0] = {source.data(), depth, depth, packed.data()};
  p.rows = rows;
  p.bias = bias.data();
  p.shortcut = shortcut.data();
  p.shortcut_pitch = p.out_pitch = p.columns = columns;
  p.out = out.data();
  p.relu = true;
  kernels.pointwise_rows(p, 0, rows, 0, panel_count(columns));
  Doubles expected(out.size());
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t o = 0; o < columns; o++) {
      double sum = static_cast<double>(plain_bias[as_size(o)]) + static_cast<double>(shortcut[as_size(row * columns + o)]);
      for (int64_t k = 0; k < depth; k++) {
        sum += static_cast<double>(source[as_size(row * depth + k)]) * static_cast<double>(weights[as_size(o * depth + k)]);
      }
      expected[as_size(row * columns + o)] = std::max(sum, 0.0);
    }
  }
  report.compare(
      "1x1 convolution, " + std::to_string(depth) + " to " + std::to_string(columns), out.data(), expected, kRounding * 2);
}

// Convolutions of `kernels`[i] x `kernels`[i] pixels at every `strides`[i]th one, each to `columns` channels, and perhaps the
// pooling, of two images whose channels lie together or apart.
struct StemCase {
  std::vector<int64_t> kernels, strides;
  int64_t channels, columns;
  bool pools, together, infinite = false;
};

void test_stem(const Kernels& kernels, Report& report, const StemCase& with) {
  constexpr int64_t kImages = 2, kHeight = 13, kWidth = 17, kPixels = kHeight * kWidth;
  Random random(as_size(with.columns));
  Floats x = random.values(kImages * kPixels * with.channels, 2);
  if (with.infinite) {
    x[3] = std::numeric_limits<float>::quiet_NaN();
    x.back() = std::numeric_limits<float>::infinity();
  }
  StemData data{};
  data.x = x.data();
  data.batch = kImages;
  data.channels = with.channels;
  data.height = kHeight;
  data.width = kWidth;
  data.image = kPixels * with.channels;
  data.channel = with.together ? 1 : kPixels;
  data.pixel = with.together ? with.channels : 1;
  data.row = kWidth * data.pixel;
  data.pools = with.pools;
  ChainWeights plain;
  std::vector<Floats> packed, biases;
  int64_t height = kHeight, width = kWidth, depth = 0;
  for (size_t i = 0; i < with.kernels.size(); i++) {
    const int64_t kernel = with.kernels[i], stride = with.strides[i], padding = kernel / 2, columns = with.columns;
    depth = kernel * kernel * (i == 0 ? with.channels : columns);
    plain.weights.push_back(random.values(columns * depth, 2 / std::sqrt(static_cast<float>(depth))));
    plain.biases.push_back(random.values(columns));
    packed.emplace_back(as_size(pointwise_floats(columns, depth)));
    kernels.pack_pointwise(plain.weights[i].data(), columns, depth, packed[i].data(), 0, panel_count(columns));
    biases.emplace_back(as_size(bias_floats(columns)));
    std::copy(plain.biases[i].begin(), plain.biases[i].end(), biases[i].begin());
    data.convolutions.push_back(
        {columns, kernel, kernel, stride, stride, padding, padding, packed[i].data(), biases[i].data()});
    height = convolved_size(height, kernel, stride, padding);
    width = convolved_size(width, kernel, stride, padding);
  }
  if (with.pools) {
    height = pooled_size(height);
    width = pooled_size(width);
  }
  Floats out(as_size(kImages * height * width * with.columns), std::numeric_limits<float>::quiet_NaN());
  data.out = out.data();
  run_stem(data, kernels);
  const std::string name =
      "stem of " + std::to_string(with.kernels.size()) + " to " + std::to_string(with.columns) + " channels";
  report.compare(name, out.data(), stem(data, plain), kRounding * static_cast<double>(4 * with.kernels.size()));
}

void test_stems(const Kernels& kernels, Report& report) {
  for (const int64_t columns : {5, 16, 24, 64}) {
    test_stem(kernels, report, {{7}, {2}, 3, columns, true, columns == 24});
    test_stem(kernels, report, {{3}, {1}, columns == 16 ? 32 : 3, columns, false, columns != 24});
  }
  test_stem(kernels, report, {{3, 3, 3}, {2, 1, 1}, 3, 11, true, true});
  test_stem(kernels, report, {{7, 3, 3}, {1, 1, 2}, 3, 16, false, false});
  for (const bool pools : {false, true}) test_stem(kernels, report, {{7}, {2}, 3, 16, pools, true, true});
}

// The gradient of a convolution's weights from V of u and Z of dz.
void test_weight_gradient(const Kernels& kernels, Report& report, int64_t w, int64_t height, int64_t width) {
  Random random(as_size(w));
  const int64_t padded = round_up(w, kUnit), row = (width + 2) * padded;
  Floats u(as_size((height + 2) * row)), dz = random.values(height * width * w);
  for (int64_t y = 1; y <= height; y++) {
    for (int64_t x = 1; x <= width; x++) {
      for (int64_t c = 0; c < w; c++) u[as_size(y * row + x * padded + c)] = random.value();
    }
  }
  const TileGrid grid = covering_tiles(height, width);
  const Block block{0, grid.per_image()};
  const PointLayout layout = PointLayout::panels_first(block.count, w);
  Floats v(as_size(layout.floats())), z(v.size()), sums(as_size(kWeightSums)), total(as_size(w * 9 * padded)),
      bias(as_size(padded));
  Step step{};
  step.in_height = step.height = height;
  step.in_width = step.width = width;
  step.channels = w;
  step.source = {u.data() + row + padded, static_cast<int64_t>(u.size()), row, padded};
  step.source_has_border = step.source_full_vectors = true;
  kernels.winograd_input(step, grid, block, v.data(), layout, 0, padded);
  kernels.winograd_gradient({dz.data(), height * width * w, width * w, w}, w, grid, block, z.data(), 0, padded);
  for (int64_t o = 0; o < w; o += kWeightRows) {
    kernels.winograd_weight_gradient(
        w, grid, block, v.data(), z.data(), sums.data(), total.data() + o * 9 * padded, bias.data() + o, o,
        std::min(o + kWeightRows, w), false);
  }
  Doubles expected(as_size(w * 9 * w)), got_bias(as_size(w));
  Floats got(expected.size());
  for (int64_t o = 0; o < w; o++) {
    for (int64_t pixel = 0; pixel < height * width; pixel++) {
      const double gradient = static_cast<double>(dz[as_size(pixel * w + o)]);
      got_bias[as_size(o)] += gradient;
      for (int64_t tap = 0; tap < 9; tap++) {
        const float* from = &u[as_size((pixel / width + tap / 3) * row + (pixel % width + tap % 3) * padded)];
        for (int64_t k = 0; k < w; k++) expected[as_size((o * 9 + tap) * w + k)] += gradient * static_cast<double>(from[k]);
      }
    }
    for (int64_t tap = 0; tap < 9; tap++) {
      std::copy_n(total.begin() + (o * 9 + tap) * padded, w, got.begin() + (o * 9 + tap) * w);
    }
  }
  const double bound = kRounding * std::sqrt(static_cast<double>(height * width)) * 2;
  report.compare("weights' gradient, " + std::to_string(w) + " channels", got.data(), expected, bound);
  report.compare("bias's gradient, " + std::to_string(w) + " channels", bias.data(), got_bias, bound);
}

// BatchNorm's passes over z (pixels, channels), forward and backward.
void test_batch_norm(const Kernels& kernels, Report& report, int64_t w, Activation activation) {
  Random random(as_size(w));
  const int64_t pixels = 37;
  const Floats z = random.values(pixels * w, 3), scale = random.values(w), shift = random.values(w);
  const Floats addend = random.values(pixels * w), grad = random.values(pixels * w), du = random.values(pixels * w);
  const std::string name = "batch norm, " + std::to_string(w) + " channels, ";
  Floats mean(as_size(w)), squares(as_size(w)), out(z.size()), next(z.size()), dz(z.size()), sums(as_size(w)),
      products(as_size(w));
  kernels.norm_moments(z.data(), w, 0, pixels, mean.data(), squares.data());
  NormForward f{w, activation, z.data(), mean.data(), scale.data(), shift.data(), out.data(), w, next.data(), addend.data(), w};
  kernels.norm_forward(f, 0, pixels);
  NormBackward b{};
  b.channels = b.grad_pitch = b.out_pitch = b.dz_pitch = w;
  b.activation = activation;
  b.grad = grad.data();
  b.du = du.data();
  b.out = out.data();
  b.z = z.data();
  b.mean = mean.data();
  b.scale = scale.data();
  b.offset = shift.data();
  b.slope = addend.data();
  b.dz = dz.data();
  kernels.norm_backward_sums(b, 0, pixels, sums.data(), products.data());
  Floats applied = dz;
  b.dz = applied.data();
  kernels.norm_backward_apply(b, 0, pixels);
  Doubles means(as_size(w)), deviations(as_size(w)), y(z.size()), u(z.size()), g(z.size()), total(as_size(w)),
      product(as_size(w)), last(z.size());
  for (int64_t c = 0; c < w; c++) {
    const auto at = [&](const Floats& from, int64_t p) { return static_cast<double>(from[as_size(p * w + c)]); };
    for (int64_t p = 0; p < pixels; p++) means[as_size(c)] += at(z, p) / static_cast<double>(pixels);
    for (int64_t p = 0; p < pixels; p++) {
      const size_t i = as_size(p * w + c);
      const double centred = at(z, p) - static_cast<double>(mean[as_size(c)]);
      deviations[as_size(c)] += std::pow(at(z, p) - means[as_size(c)], 2);
      y[i] = activated(centred * at(scale, 0) + at(shift, 0), activation);
      u[i] = y[i] + at(addend, p);
      const double shown = at(out, p), sum = at(grad, p) + at(du, p);
      g[i] = shown > 0 ? sum : activation.kind == Activation::leaky_relu ? sum * static_cast<double>(activation.slope) : 0;
      total[as_size(c)] += g[i];
      product[as_size(c)] += g[i] * centred;
      last[i] = at(scale, 0) * (at(dz, p) - at(shift, 0) - centred * at(addend, 0));
    }
  }
  const double many = kRounding * static_cast<double>(pixels);
  report.compare(name + "mean", mean.data(), means, kRounding);
  report.compare(name + "squares", squares.data(), deviations, many);
  report.compare(name + "output", out.data(), y, kRounding);
  report.compare(name + "next source", next.data(), u, kRounding);
  report.compare(name + "gradient", dz.data(), g, kRounding);
  report.compare(name + "sum of gradients", sums.data(), total, many);
  report.compare(name + "sum of products", products.data(), product, many * 3);
  report.compare(name + "gradient of z", applied.data(), last, kRounding * 2);
}

// Each unit is worked on once, whoever takes it; and a part that stands still at its first unit keeps no other from the rest.
bool steals_work(int64_t units, int64_t parts, bool stalls) {
  std::vector<std::atomic<int>> times(as_size(units));
  std::atomic<int64_t> done{0};
  WorkStealing work(units, parts);
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  std::atomic<bool> alone{true};
  const auto run = [&](int64_t part) {
    work.work(part, [&](int64_t unit) {
      while (stalls && part == 0 && done < units - 1 && std::chrono::steady_clock::now() < give_up) std::this_thread::yield();
      if (stalls && part == 0 && done < units - 1) alone = false;
      times[as_size(unit)]++;
      done++;
    });
  };
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < parts; part++) threads.emplace_back(run, part);
  for (std::thread& thread : threads) thread.join();
  for (const std::atomic<int>& one : times) alone = alone && one == 1;
  return alone;
}

bool test_work_stealing() {
  bool right = true;
  for (const int64_t units : {0, 1, 2, 7, 1000}) {
    for (const int64_t parts : {1, 2, 3, 8}) right = right && steals_work(units, parts, false);
  }
  for (const int64_t parts : {2, 3}) right = right && steals_work(20, parts, true);
  if (!right) std::printf("MISS work that threads take from each other\n");
  return right;
}

void test_all(const Kernels& kernels, Report& report) {
  test_chains(kernels, report);
  for (const int64_t columns : {5, 16, 24, 56}) test_pointwise(kernels, report, 19, columns == 24 ? 1030 : 37, columns);
  test_stems(kernels, report);
  for (const int64_t channels : {3, 16, 26}) test_weight_gradient(kernels, report, channels, 7, 10);
  for (const int64_t channels : {5, 32}) {
    test_batch_norm(kernels, report, channels, {Activation::relu});
    test_batch_norm(kernels, report, channels, {Activation::leaky_relu, 0.2f});
  }
}

}  // namespace

int main(int count, char** arguments) {
  const Kernels* const best = find_kernels(InstructionSet::best);
  if (count > 1 && std::strcmp(best->name, arguments[1]) != 0) {
    std::printf("MISS the best set is %s, not %s\n", best->name, arguments[1]);
    return 1;
  }
  int misses = !test_work_stealing() + !test_sharing();
  for (const auto set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512, InstructionSet::neon}) {
    const Kernels* const kernels = find_kernels(set);
    if (kernels == nullptr || (count > 1 && kernels != best)) continue;
    Report report;
    report.set = kernels->name;
    test_all(*kernels, report);
    std::printf(
        "%s: %d comparisons, %d misses, largest error %.2f of its bound\n", kernels->name, report.comparisons, report.misses,
        report.worst);
    misses += report.misses;
  }
  return misses != 0;
}
