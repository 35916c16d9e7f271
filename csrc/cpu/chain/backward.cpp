// Walks from the last group to the first, with dy_i = dout_i + du_{i+1}:
//
//   dz_i = dy_i where y_i passed its input on         dz_i * K_i turned  = du_i -> grad_x       u_i, dz_i -> dK_i, db_i
//   +-----------+   V   +----+  x U   +----+                     +------+
//   | dz_i      | ----> | 36 | -----> | 36 | ------------------> | du_i |
//   +-----------+       +----+        +----+                     +------+
//        ^                                                           |  + dout_{i-1}, masked by y_{i-1}: the next dz
//        +-----------------------------------------------------------+
//
// dz and u lie between zero borders in scratch memory. With Schedule::images one thread takes some images through all of it,
// in its own cache; with Schedule::channels, where weights are most of the traffic, each part has its own channels of every
// tensor, packs the weights that it needs into its cache, and two barriers a step keep the parts together.
#include "cpu/chain/backward.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/chain/forward.h"
#include "cpu/chain/padded_images.h"
#include "cpu/chain/weight_gradients.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/work_split.h"

namespace res2net_fused {
namespace {

class BackwardRun {
 public:
  BackwardRun(
      const ChainProblem& problem, const BackwardPlan& plan, const BackwardData& data, bool need_x, const Kernels& kernels)
      : problem_(problem), plan_(plan), data_(data), needs_x_(need_x), needs_weights_(data.gradients != nullptr),
        kernels_(kernels), split_{plan.parts}, no_bias_(static_cast<size_t>(bias_floats(problem.channels))) {}

  void images() const;
  void channels() const;
  bool right() const { return right_; }

 private:
  int64_t group_of(int64_t step) const { return problem_.first_convolved() + step; }
  // Whether step i's convolution feeds the one before it.
  bool feeds(int64_t step) const { return step > 0 && problem_.adds(group_of(step)); }
  bool needs_input(int64_t step) const { return needs_x_ || feeds(step); }
  // Whether dz of this step is written by the step behind it.
  bool is_fed(int64_t step) const { return step + 1 < problem_.steps && feeds(step + 1); }

  template <class V>
  V group(V view, int64_t index, int64_t first_image) const {
    return res2net_fused::group_of(view, index, problem_.channels, first_image);
  }

  Step shape() const;
  Step input_step(int64_t i, const PaddedImages& dz, int64_t first_image) const;
  Step weight_step(int64_t i, const PaddedImages& u, int64_t first_image) const;
  void mask_rows(int64_t i, const PaddedImages& dz, int64_t first_image, int64_t first_row, int64_t last_row) const;
  void sum_rows(int64_t i, const PaddedImages& u, int64_t first_image, int64_t first_row, int64_t last_row) const;

  // Floats of V or Z in either layout.
  int64_t points_floats(int64_t tiles) const { return PointLayout::panels_first(tiles, problem_.channels).floats(); }
  int64_t m_floats(int64_t tiles) const { return products_floats(kernels_, tiles, problem_.channels); }

  const ChainProblem& problem_;
  const BackwardPlan& plan_;
  const BackwardData& data_;
  const bool needs_x_, needs_weights_;
  const Kernels& kernels_;
  const WorkSplit split_;
  const std::vector<float> no_bias_;
  mutable std::atomic<bool> right_{true};
};

Step BackwardRun::shape() const {
  Step step{};
  step.in_height = step.height = problem_.height;
  step.in_width = step.width = problem_.width;
  step.channels = problem_.channels;
  step.groups = step.stride = step.row_dilation = step.column_dilation = 1;
  step.activation = {Activation::none};
  return step;
}

// dz_i to du_i in its group of grad_x, and to the dz before it.
Step BackwardRun::input_step(int64_t i, const PaddedImages& dz, int64_t first_image) const {
  const int64_t index = group_of(i);
  Step step = shape();
  step.source = constant(dz.view(i));
  step.source_has_border = step.source_full_vectors = true;
  step.out = group(data_.grad_x, index, first_image);
  step.out_full_vectors = problem_.channels == problem_.padded();  // the group behind is there already
  if (feeds(i)) {
    step.addend = group(data_.grad, index - 1, first_image);
    step.addend_full_vectors = problem_.full_vectors(index - 1, data_.room);
    step.next = dz.view(i - 1);
    if (problem_.activation.kind != Activation::none) step.mask = group(data_.out, index - 1, first_image);
    step.mask_activation = problem_.activation;
  }
  step.bias = no_bias_.data();
  return step;
}

// u_i, which is x_i itself where nothing was added to it.
Step BackwardRun::weight_step(int64_t i, const PaddedImages& u, int64_t first_image) const {
  const int64_t index = group_of(i);
  Step step = shape();
  step.source_has_border = problem_.adds(index);
  step.source = problem_.adds(index) ? constant(u.view(i)) : group(data_.x, index, first_image);
  step.source_full_vectors = problem_.adds(index) || problem_.full_vectors(index, data_.room);
  return step;
}

// dz_i from dout_i alone; rows are counted over the images.
void BackwardRun::mask_rows(int64_t i, const PaddedImages& dz, int64_t first_image, int64_t first_row, int64_t last_row) const {
  const ConstView grad = group(data_.grad, group_of(i), first_image), out = group(data_.out, group_of(i), first_image);
  const View to = dz.view(i);
  NormBackward n{};
  n.channels = problem_.channels;
  n.activation = problem_.activation;
  n.grad_pitch = grad.pixel;
  n.out_pitch = out.pixel;
  n.dz_pitch = to.pixel;
  for (int64_t row = first_row; row < last_row; row++) {
    const int64_t image = row / problem_.height, y = row % problem_.height;
    n.grad = grad.at(image, y, 0);
    n.out = out.at(image, y, 0);
    n.dz = to.at(image, y, 0);
    kernels_.activation_backward(n, 0, problem_.width);
  }
}

void BackwardRun::sum_rows(int64_t i, const PaddedImages& u, int64_t first_image, int64_t first_row, int64_t last_row) const {
  const int64_t index = group_of(i);
  if (!needs_weights_ || !problem_.adds(index)) return;
  kernels_.copy_rows(
      group(data_.x, index, first_image), group(data_.out, index - 1, first_image), u.view(i), problem_.height, problem_.width,
      problem_.channels, first_row, last_row);
}

void BackwardRun::images() const {
  const int64_t w = problem_.channels, padded = problem_.padded(), panels = panel_count(w), steps = problem_.steps;
  const int64_t per_image = plan_.grid.per_image(), tiles = plan_.images * per_image;
  const int64_t weight_tiles = std::min(plan_.weight_tiles, tiles), block_tiles = std::min(plan_.block_tiles, tiles);
  const int64_t v = points_floats(std::max(weight_tiles, block_tiles));
  const int64_t other = std::max(points_floats(weight_tiles) + kWeightSums, m_floats(block_tiles));  // Z and sums, or M
  const int64_t sources = PaddedImages(problem_, plan_.images).floats();
  const int64_t each = round_up(2 * sources + v + other, 1024) + kAlignment, weights = winograd_floats(w);
  const int64_t total = needs_weights_ ? total_floats(w) : 0;
  const Scratch scratch(steps * (weights + plan_.parts * total) + plan_.parts * each);
  float *const packed = scratch.data(), *const totals = packed + steps * weights;
  for (int64_t i = 0; i < steps; i++) {
    if (needs_input(i)) pack_ahead(data_.weights + i, 1, w, packed + i * weights, kernels_);
  }
  split_.for_each([&](int64_t part) {
    float* const memory = totals + steps * plan_.parts * total + part * each;
    PaddedImages dz(problem_, plan_.images), u(problem_, plan_.images);
    dz.place(memory);
    u.place(memory + sources);
    dz.zero_borders();
    u.zero_borders();
    float *const in = memory + 2 * sources, *const rest = in + v, *const sums = rest + points_floats(weight_tiles);
    const int64_t begin = split_.share(problem_.batch, part), end = split_.share(problem_.batch, part + 1);
    for (int64_t n = begin; n < end; n += plan_.images) {
      const int64_t images = std::min(plan_.images, end - n), rows = images * problem_.height;
      for (int64_t i = steps - 1; i >= 0; i--) {
        if (!is_fed(i)) mask_rows(i, dz, n, 0, rows);
        if (needs_weights_) {
          sum_rows(i, u, n, 0, rows);
          const Step step = weight_step(i, u, n);
          float* const to = totals + (i * plan_.parts + part) * total;
          for_each_block(0, images * per_image, weight_tiles, [&](Block block, int64_t) {
            kernels_.winograd_input(step, plan_.grid, block, in, PointLayout::panels_first(block.count, w), 0, padded);
            kernels_.winograd_gradient(constant(dz.view(i)), w, plan_.grid, block, rest, 0, padded);
            const bool add = n > begin || block.first > 0;
            kernels_.winograd_weight_gradient(w, plan_.grid, block, in, rest, sums, to, to + bias_total(w), 0, w, add);
          });
        }
        if (!needs_input(i)) continue;
        Step step = input_step(i, dz, n);
        step.winograd = packed + i * weights;
        step.winograd_point = winograd_point(w);
        for_each_block(0, images * per_image, block_tiles, [&](Block block, int64_t) {
          kernels_.winograd_input(step, plan_.grid, block, in, PointLayout::tiles_first(block.count, w), 0, padded);
          if (!kernels_.winograd_output(step, plan_.grid, block, in, rest, nullptr, 0, panels)) right_ = false;
        });
      }
    }
  });
  for (int64_t i = 0; needs_weights_ && i < steps; i++) {
    if (!data_.gradients[i].gather(totals + i * plan_.parts * total, plan_.parts, total)) right_ = false;
  }
}

void BackwardRun::channels() const {
  const int64_t w = problem_.channels, panels = panel_count(w), tiles = problem_.batch * plan_.grid.per_image();
  const int64_t rows = problem_.batch * problem_.height;
  const int64_t blocks = (tiles + plan_.block_tiles - 1) / plan_.block_tiles, block_tiles = (tiles + blocks - 1) / blocks;
  const int64_t block_v = points_floats(block_tiles), all_v = blocks * block_v, m = m_floats(block_tiles);
  const int64_t sources = PaddedImages(problem_, problem_.batch).floats();
  const int64_t packed_floats = kPoints * w * kernels_.panels_per_pass * kPanel;
  const int64_t each = round_up(std::max(m + packed_floats, form_floats(w)), 1024) + kAlignment;
  const Scratch scratch(2 * sources + 3 * all_v + plan_.parts * each);
  PaddedImages dz(problem_, problem_.batch), u(problem_, problem_.batch);
  dz.place(scratch.data());
  u.place(scratch.data() + sources);
  dz.zero_borders();
  u.zero_borders();
  float *const v_dz = scratch.data() + 2 * sources, *const v_u = v_dz + all_v, *const z = v_u + all_v;
  float* const own = z + all_v;
  const auto blockwise = [&](const auto& f) {
    for_each_block(0, tiles, plan_.block_tiles, [&](Block block, int64_t b) { f(block, b * block_v); });
  };
  // What does not depend on the step behind it.
  const auto prepare = [&](int64_t i, int64_t part) {
    sum_rows(i, u, 0, split_.share(rows, part), split_.share(rows, part + 1));
    if (!is_fed(i)) mask_rows(i, dz, 0, split_.share(rows, part), split_.share(rows, part + 1));
  };
  const auto transform = [&](int64_t i, int64_t part) {
    const int64_t first = split_.share(panels, part) * kPanel;
    const int64_t last = std::min(split_.share(panels, part + 1) * kPanel, problem_.padded());
    const Step of_input = input_step(i, dz, 0), of_weight = weight_step(i, u, 0);
    blockwise([&](Block block, int64_t at) {
      if (needs_input(i)) {
        kernels_.winograd_input(of_input, plan_.grid, block, v_dz + at, PointLayout::tiles_first(block.count, w), first, last);
      }
      if (!needs_weights_) return;
      kernels_.winograd_input(of_weight, plan_.grid, block, v_u + at, PointLayout::panels_first(block.count, w), first, last);
      kernels_.winograd_gradient(of_input.source, w, plan_.grid, block, z + at, first, last);
    });
  };
  const auto multiply = [&](int64_t i, int64_t part) {
    float *const memory = own + part * each, *const packed = memory + m;
    const int64_t first = split_.share(panels, part), count = split_.share(panels, part + 1) - first;
    if (needs_weights_) {
      const int64_t last = std::min((first + count) * kPanel, w);
      const WeightGradients& gradients = data_.gradients[i];
      if (!gradients.form(kernels_, plan_.grid, blockwise, v_u, z, memory, first * kPanel, last)) right_ = false;
    }
    if (!needs_input(i)) return;
    Step step = input_step(i, dz, 0);
    const int64_t passes = (count + kernels_.panels_per_pass - 1) / kernels_.panels_per_pass;
    for (int64_t p = 0; p < passes; p++) {
      const int64_t from = first + count * p / passes, to = first + count * (p + 1) / passes;
      step.winograd = packed;
      step.winograd_point = w * (std::min(to * kPanel, problem_.padded()) - from * kPanel);
      kernels_.pack_winograd(data_.weights[i], w, packed, step.winograd_point, from, to);
      blockwise([&](Block block, int64_t at) {
        if (!kernels_.winograd_output(step, plan_.grid, block, v_dz + at, memory, nullptr, from, to)) right_ = false;
      });
    }
  };
  split_.for_each([&](int64_t part) { prepare(problem_.steps - 1, part); });
  for (int64_t i = problem_.steps - 1; i >= 0; i--) {
    split_.for_each([&](int64_t part) { transform(i, part); });
    split_.for_each([&](int64_t part) {
      multiply(i, part);
      if (i > 0) prepare(i - 1, part);  // into the other of the two sources
    });
  }
}

int64_t tiles_of(const ChainProblem& problem) {
  return problem.batch * covering_tiles(problem.height, problem.width).per_image();
}

// Threads that there is work for, if it were not cut at images.
int64_t busy_threads(const ChainProblem& problem, int64_t threads) {
  return std::min(threads, std::max<int64_t>(1, tiles_of(problem) / kTilesWorthAPart));
}

}  // namespace

bool backward_covers(const ChainProblem& problem, int64_t threads) {
  if (!winograd_pays(problem) || problem.batch < 1) return false;
  if (shares_channels(tiles_of(problem), problem.channels, threads)) return true;
  // The slowest thread decides. One operator after the other cuts images too.
  const int64_t busy = busy_threads(problem, threads);
  return divide_up(problem.batch, busy) * busy * 4 <= problem.batch * 5;
}

BackwardPlan plan_backward(const ChainProblem& problem, int64_t threads) {
  threads = std::max<int64_t>(threads, 1);
  BackwardPlan plan{};
  plan.grid = covering_tiles(problem.height, problem.width);
  const int64_t per_image = plan.grid.per_image();
  if (shares_channels(tiles_of(problem), problem.channels, threads)) {
    plan.schedule = Schedule::channels;
    plan.parts = std::min(threads, panel_count(problem.channels));
    plan.block_tiles = kSharedBlockTiles;
    return plan;
  }
  plan.schedule = Schedule::images;
  plan.parts = std::min(problem.batch, busy_threads(problem, threads));
  plan.weight_tiles = weight_block_tiles(problem.channels);
  plan.block_tiles = problem.channels <= 64 ? 24 : 16;
  const int64_t rounds = (problem.batch + plan.parts - 1) / plan.parts;
  plan.images = std::min((plan.weight_tiles + per_image - 1) / per_image, rounds);
  return plan;
}

bool run_backward(
    const ChainProblem& problem, const BackwardPlan& plan, const BackwardData& data, bool need_x, const Kernels& kernels) {
  const BackwardRun run(problem, plan, data, need_x, kernels);
  plan.schedule == Schedule::images ? run.images() : run.channels();
  return run.right();
}

}  // namespace res2net_fused
