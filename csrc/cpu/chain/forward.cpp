#include "cpu/chain/forward.h"

#include <algorithm>
#include <atomic>

#include "cpu/chain/image_groups.h"
#include "cpu/chain/padded_images.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/work_split.h"

namespace res2net_fused {
namespace {

// Reads one float of every cache line of some images, in the order of memory. The chain reads and writes a group at a time,
// short pieces far apart, which comes from memory at a fraction of the speed at which whole rows do. Not of
// pixels far apart: what lies between them would come too, gigabytes of it where x is a slice of something huge.
void bring_near(ConstView view, int64_t images, int64_t height, int64_t width, int64_t channels) {
  constexpr int64_t kLine = 16;
  if (view.pixel > 4 * channels) return;
  for (int64_t row = 0; row < images * height; row++) {
    const float* from = view.at(row / height, row % height, 0);
    const int64_t floats = (width - 1) * view.pixel + channels;
    for (int64_t i = 0; i < floats; i += kLine) static_cast<void>(*static_cast<const volatile float*>(from + i));
  }
}

constexpr int64_t kUnitsOfThread = 8;  // of rows that are convolved directly, so that none waits long for the last one

// Scratch of one thread for Winograd blocks.
struct BlockScratch {
  float *v, *m, *patch;
};

class Run {
 public:
  Run(const ChainProblem& problem, const ChainPlan& plan, const ChainData& data, const Kernels& kernels)
      : problem_(problem), plan_(plan), data_(data), kernels_(kernels), split_{plan.parts} {}

  void images() const;
  void tiles() const;
  void channels() const;

  // The first `images` images, by one thread.
  void image_group(const PaddedImages& sources, int64_t images, const BlockScratch& scratch) const;

  int64_t barriers() const {
    if (plan_.schedule == Schedule::images || plan_.parts == 1) return 0;
    if (all_at_once()) return 1;
    if (plan_.schedule == Schedule::channels) return needs_copy(0) + problem_.steps;
    int64_t copies = 0;
    for (int64_t i = 0; i < problem_.steps; i++) copies += needs_copy(i);
    return copies + problem_.steps + passes_first() + passes_last();
  }

  // Whether all results were finite, or computed again.
  bool right() const { return right_; }

  int64_t v_floats(int64_t tiles) const { return PointLayout::tiles_first(tiles, problem_.channels).floats(); }
  int64_t m_floats(int64_t tiles) const { return products_floats(kernels_, tiles, problem_.channels); }
  int64_t patch_floats() const { return round_up(kPoints * problem_.channels, kAlignment); }
  // Tiles of a block where whole images are worked on.
  int64_t image_tiles() const {
    return plan_.winograd ? std::min(plan_.block_tiles, plan_.images * plan_.grid.per_image()) : 0;
  }

 private:
  int64_t group_of(int64_t step) const { return problem_.first_convolved() + step; }
  // Whether a convolution reads its group where x has it.
  bool reads_x(int64_t step) const {
    return (plan_.winograd ? !plan_.copies_source : data_.x_has_border) && !problem_.adds(group_of(step));
  }
  bool needs_copy(int64_t step) const { return !reads_x(step) && (step == 0 || !problem_.adds(group_of(step))); }
  // Whether no convolution waits for another, nor spills into its slot.
  bool all_at_once() const { return !plan_.winograd && data_.x_has_border && !problem_.adds(group_of(problem_.steps - 1)); }

  // Whether the last convolution copies the passed group, tile by tile; else it has a turn of its own.
  bool copies_passed() const {
    return plan_.winograd && problem_.passthrough == Passthrough::last && problem_.pool == Pool::none;
  }
  bool passes_first() const { return problem_.passed_group() == 0; }
  bool passes_last() const { return problem_.passed_group() > 0 && !copies_passed(); }

  Step step(int64_t i, const PaddedImages& sources, int64_t first_image) const;
  void copy_source(int64_t i, const PaddedImages& sources, int64_t first_image, int64_t first_row, int64_t last_row) const;
  void convolve_directly(int64_t first, int64_t last, bool passed, const PaddedImages& sources) const;
  void pass_all() const;
  void pass(int64_t first_image, int64_t first_row, int64_t last_row) const;
  void channels_from_weights() const;
  void winograd_block(const Step& step, Block block, const BlockScratch& scratch) const {
    winograd_block(step, block, scratch, 0, panel_count(problem_.channels));
  }
  void winograd_block(
      const Step& step, Block block, const BlockScratch& scratch, int64_t first_panel, int64_t last_panel) const;
  void begin(const PaddedImages& sources) const;

  ConstView x_group(int64_t group, int64_t first_image) const {
    return res2net_fused::group_of(data_.x, group, problem_.channels, first_image);
  }
  View out_group(int64_t group, int64_t first_image) const {
    return res2net_fused::group_of(data_.out, group, problem_.channels, first_image);
  }
  void note(bool right) const {
    if (!right) right_ = false;
  }

  const ChainProblem& problem_;
  const ChainPlan& plan_;
  const ChainData& data_;
  const Kernels& kernels_;
  const WorkSplit split_;
  mutable std::atomic<bool> right_{true};
};

Step Run::step(int64_t i, const PaddedImages& sources, int64_t first_image) const {
  const ChainProblem& p = problem_;
  const int64_t group = group_of(i);
  const bool from_x = reads_x(i);
  Step step{};
  step.in_height = p.height;
  step.in_width = p.width;
  step.height = p.out_height();
  step.width = p.out_width();
  step.channels = p.channels;
  step.groups = p.groups;
  step.stride = p.stride;
  step.row_dilation = p.row_dilation();
  step.column_dilation = p.column_dilation();
  step.activation = p.activation;
  step.source = from_x ? x_group(group, first_image) : constant(sources.view(i));
  step.source_has_border = !from_x || data_.x_has_border;
  step.source_full_vectors = !from_x || p.full_vectors(group, data_.room);
  if (i + 1 < p.steps && p.adds(group + 1)) {
    step.addend = x_group(group + 1, first_image);
    step.addend_full_vectors = p.full_vectors(group + 1, data_.room);
    step.next = sources.view(i + 1);
  }
  step.out = out_group(group, first_image);
  step.out_full_vectors = p.full_vectors(group, data_.room);
  if (copies_passed() && i + 1 == p.steps) {
    step.passed = x_group(p.passed_group(), first_image);
    step.passed_out = out_group(p.passed_group(), first_image);
  }
  if (data_.winograd != nullptr) step.winograd = data_.winograd + i * winograd_floats(p.channels);
  step.winograd_point = winograd_point(p.channels);
  if (data_.direct != nullptr) step.direct = data_.direct + i * p.groups * direct_group_floats(p.channels / p.groups);
  step.bias = data_.bias + i * bias_floats(p.channels);
  return step;
}

void Run::copy_source(int64_t i, const PaddedImages& sources, int64_t first_image, int64_t first_row, int64_t last_row) const {
  const int64_t group = group_of(i);
  // Only the first convolution of "first_added" comes here with something to add: the passed group.
  const ConstView plus = problem_.adds(group) ? constant(out_group(group - 1, first_image)) : ConstView{};
  kernels_.copy_rows(
      x_group(group, first_image), plus, sources.view(i), problem_.height, problem_.width, problem_.channels, first_row,
      last_row);
}

void Run::pass(int64_t first_image, int64_t first_row, int64_t last_row) const {
  const int64_t group = problem_.passed_group();
  kernels_.pass_rows(
      x_group(group, first_image), problem_.height, problem_.width, out_group(group, first_image), problem_.out_height(),
      problem_.out_width(), problem_.channels, problem_.stride, problem_.pool, first_row, last_row);
}

void Run::winograd_block(
    const Step& step, Block block, const BlockScratch& scratch, int64_t first_panel, int64_t last_panel) const {
  kernels_.winograd_input(
      step, plan_.grid, block, scratch.v, PointLayout::tiles_first(block.count, problem_.channels), 0, problem_.padded());
  note(kernels_.winograd_output(step, plan_.grid, block, scratch.v, scratch.m, scratch.patch, first_panel, last_panel));
}

void Run::image_group(const PaddedImages& sources, int64_t images, const BlockScratch& scratch) const {
  const int64_t out_rows = images * problem_.out_height(), channels = problem_.scale() * problem_.channels;
  if (plan_.brings_near) {
    bring_near(x_group(0, 0), images, problem_.height, problem_.width, channels);
    bring_near(constant(out_group(0, 0)), images, problem_.out_height(), problem_.out_width(), channels);
  }
  if (passes_first()) pass(0, 0, out_rows);
  for (int64_t i = 0; i < problem_.steps; i++) {
    if (needs_copy(i)) copy_source(i, sources, 0, 0, images * problem_.height);
    const Step step = this->step(i, sources, 0);
    if (plan_.winograd) {
      for_each_block(0, images * plan_.grid.per_image(), plan_.block_tiles, [&](Block block, int64_t) {
        winograd_block(step, block, scratch);
      });
    } else {
      const int64_t panels = problem_.groups * panel_count(problem_.channels / problem_.groups);
      kernels_.direct_rows(step, 0, out_rows, 0, panels);
    }
  }
  if (passes_last()) pass(0, 0, out_rows);  // last: the slot before it spills into it
}

void Run::images() const {
  for_image_groups(plan_, problem_.batch, ImageChain::scratch_floats(problem_, plan_, kernels_), [&](float* memory) {
    return [this, chain = ImageChain(problem_, plan_, kernels_, memory)](int64_t n, int64_t images) {
      ChainData data = data_;
      data.x.data += n * data.x.image;
      data.out.data += n * data.out.image;
      note(chain.run(data, images));
    };
  });
}

void Run::tiles() const {
  PaddedImages sources(problem_, problem_.batch);
  if (all_at_once()) return convolve_directly(0, problem_.steps, problem_.passed_group() >= 0, sources);  // which stay empty
  const int64_t all_tiles = plan_.winograd ? problem_.batch * plan_.grid.per_image() : 0;
  const WorkSplit blocks{plan_.winograd ? plan_.parts * divide_up(divide_up(all_tiles, plan_.parts), plan_.block_tiles) : 1};
  const int64_t block_tiles = divide_up(all_tiles, blocks.count);
  const int64_t v = plan_.winograd ? v_floats(block_tiles) : 0, m = plan_.winograd ? m_floats(block_tiles) : 0;
  const int64_t each = round_up(v + m + patch_floats(), 1024) + kAlignment;
  const Scratch scratch(sources.floats() + each * plan_.parts);
  sources.place(scratch.data());
  sources.zero_borders();
  float* const own = scratch.data() + sources.floats();

  const int64_t rows = problem_.batch * problem_.height;
  if (passes_first()) pass_all();
  for (int64_t i = 0; i < problem_.steps; i++) {
    if (needs_copy(i)) {
      split_.for_each(
          [&](int64_t part) { copy_source(i, sources, 0, split_.share(rows, part), split_.share(rows, part + 1)); });
    }
    if (!plan_.winograd) {
      convolve_directly(i, i + 1, false, sources);
      continue;
    }
    const Step step = this->step(i, sources, 0);
    share_out(blocks.count, plan_.parts, [&](int64_t part, int64_t block) {
      float* const memory = own + part * each;
      winograd_block(step, blocks.block(all_tiles, block), {memory, memory + v, memory + v + m});
    });
  }
  if (passes_last()) pass_all();
}

void Run::pass_all() const {
  const int64_t out_rows = problem_.batch * problem_.out_height();
  split_.for_each([&](int64_t part) { pass(0, split_.share(out_rows, part), split_.share(out_rows, part + 1)); });
}

// Convolutions first ... last, which do not wait for each other, and the group that passes them by if it is `passed`. Shared
// out: rows, or channels where rows are few, and rows of them where there are too few of both.
void Run::convolve_directly(int64_t first, int64_t last, bool passed, const PaddedImages& sources) const {
  const int64_t out_rows = problem_.batch * problem_.out_height(), steps = last - first;
  const int64_t panels = problem_.groups * panel_count(problem_.channels / problem_.groups);
  const bool by_rows = out_rows >= 4 * plan_.parts;
  const int64_t passes = divide_up(panels, kernels_.panels_per_pass);
  const WorkSplit channels{by_rows ? 1 : std::max(std::min(panels, plan_.parts), passes)};
  const int64_t each = steps * channels.count;
  const int64_t fewest = by_rows ? std::min(out_rows, divide_up(kUnitsOfThread * plan_.parts, each)) : 1;
  const WorkSplit cuts{row_cuts(out_rows, each, fewest, out_rows, plan_.parts)};
  share_out((each + passed) * cuts.count, plan_.parts, [&](int64_t, int64_t unit) {
    const int64_t item = unit / cuts.count, cut = unit % cuts.count, channel = item % channels.count;
    const int64_t from = cuts.share(out_rows, cut), to = cuts.share(out_rows, cut + 1);
    if (item == each) return pass(0, from, to);
    kernels_.direct_rows(
        step(first + item / channels.count, sources, 0), from, to, channels.share(panels, channel),
        channels.share(panels, channel + 1));
  });
}

// Each part multiplies and writes its own channels. All of them need all of V, which has more than twice the cache lines of u;
// to fetch a line that another core has written takes longer than to compute it: each part transforms all of u for itself.
void Run::channels() const {
  if (data_.plain != nullptr) return channels_from_weights();
  PaddedImages sources(problem_, problem_.batch);
  const int64_t tiles = problem_.batch * plan_.grid.per_image(), panels = panel_count(problem_.channels);
  const int64_t block_tiles = divide_up(tiles, divide_up(tiles, plan_.block_tiles));
  const int64_t v = v_floats(block_tiles), m = m_floats(block_tiles);
  const int64_t each = round_up(v + m + patch_floats(), 1024) + kAlignment;
  const Scratch scratch(sources.floats() + each * plan_.parts);
  sources.place(scratch.data());
  sources.zero_borders();
  float* const own = scratch.data() + sources.floats();
  begin(sources);
  for (int64_t i = 0; i < problem_.steps; i++) {
    split_.for_each([&](int64_t part) {
      float* const memory = own + part * each;
      const int64_t first = split_.share(panels, part), last = split_.share(panels, part + 1);
      Step step = this->step(i, sources, 0);
      step.winograd += first * kPanel * problem_.channels;
      for_each_block(0, tiles, plan_.block_tiles, [&](Block block, int64_t) {
        winograd_block(step, block, {memory, memory + v, memory + v + m}, first, last);
      });
    });
  }
  if (passes_last()) pass(0, 0, problem_.batch * problem_.out_height());
}

// The same with weights that each part packs, a pass of them at a time, so that they stay in cache; it meets all tiles, of which
// V is kept, shared by all parts. What a part writes is what it transforms for the next step, so that one barrier a step is
// enough; V takes turns between two buffers.
void Run::channels_from_weights() const {
  PaddedImages sources(problem_, problem_.batch);
  const int64_t w = problem_.channels, tiles = problem_.batch * plan_.grid.per_image(), panels = panel_count(w);
  const int64_t blocks = divide_up(tiles, plan_.block_tiles), block_tiles = divide_up(tiles, blocks);
  const int64_t block_v = v_floats(block_tiles), v = blocks * block_v, m = m_floats(block_tiles), patch = patch_floats();
  const int64_t packed = kPoints * w * kernels_.panels_per_pass * kPanel;
  const int64_t each = round_up(m + patch + packed, 1024) + kAlignment;
  const Scratch scratch(sources.floats() + 2 * v + each * plan_.parts);
  sources.place(scratch.data());
  sources.zero_borders();
  float* const transformed = scratch.data() + sources.floats();
  float* const own = transformed + 2 * v;

  const auto blockwise = [&](const auto& f) {
    for_each_block(0, tiles, plan_.block_tiles, [&](Block block, int64_t b) { f(block, b * block_v); });
  };
  const auto transform = [&](int64_t i, int64_t part) {
    const int64_t first = split_.share(panels, part) * kPanel;
    const int64_t last = std::min(split_.share(panels, part + 1) * kPanel, problem_.padded());
    blockwise([&](Block block, int64_t at) {
      const PointLayout layout = PointLayout::tiles_first(block.count, w);
      kernels_.winograd_input(step(i, sources, 0), plan_.grid, block, transformed + (i % 2) * v + at, layout, first, last);
    });
  };
  const auto multiply = [&](int64_t i, int64_t part, int64_t first, int64_t last) {
    float* const memory = own + part * each;
    Step step = this->step(i, sources, 0);
    step.winograd = memory + m + patch;
    step.winograd_point = w * (std::min(last * kPanel, problem_.padded()) - first * kPanel);
    kernels_.pack_winograd(data_.plain[i], w, memory + m + patch, step.winograd_point, first, last);
    blockwise([&](Block block, int64_t at) {
      note(kernels_.winograd_output(step, plan_.grid, block, transformed + (i % 2) * v + at, memory, memory + m, first, last));
    });
  };

  begin(sources);
  split_.for_each([&](int64_t part) { transform(0, part); });
  for (int64_t i = 0; i < problem_.steps; i++) {
    split_.for_each([&](int64_t part) {
      const int64_t first = split_.share(panels, part), count = split_.share(panels, part + 1) - first;
      const int64_t passes = divide_up(count, kernels_.panels_per_pass);
      for (int64_t p = 0; p < passes; p++) {
        multiply(i, part, first + count * p / passes, first + count * (p + 1) / passes);
      }
      if (i + 1 < problem_.steps) transform(i + 1, part);
    });
  }
  if (passes_last()) pass(0, 0, problem_.batch * problem_.out_height());
}

// What the first convolution waits for, where channels are shared.
void Run::begin(const PaddedImages& sources) const {
  const int64_t rows = problem_.batch * problem_.height;
  if (passes_first()) pass(0, 0, problem_.batch * problem_.out_height());
  if (!needs_copy(0)) return;
  split_.for_each([&](int64_t part) { copy_source(0, sources, 0, split_.share(rows, part), split_.share(rows, part + 1)); });
}

}  // namespace

ImageChain::ImageChain(const ChainProblem& problem, const ChainPlan& plan, const Kernels& kernels, float* scratch)
    : problem_(problem), plan_(plan), kernels_(kernels), scratch_(scratch) {
  PaddedImages sources(problem_, plan_.images);
  sources.place(scratch_);
  sources.zero_borders();
}

int64_t ImageChain::scratch_floats(const ChainProblem& problem, const ChainPlan& plan, const Kernels& kernels) {
  const Run run(problem, plan, ChainData{}, kernels);
  const int64_t tiles = run.image_tiles();
  const int64_t blocks = plan.winograd ? run.v_floats(tiles) + run.m_floats(tiles) : 0;
  return round_up(PaddedImages(problem, plan.images).floats() + blocks + run.patch_floats(), 1024) + kAlignment;
}

bool ImageChain::run(const ChainData& data, int64_t images) const {
  const Run run(problem_, plan_, data, kernels_);
  PaddedImages sources(problem_, plan_.images);
  sources.place(scratch_);
  float* const v = scratch_ + sources.floats();
  float* const m = v + (plan_.winograd ? run.v_floats(run.image_tiles()) : 0);
  float* const patch = m + (plan_.winograd ? run.m_floats(run.image_tiles()) : 0);
  run.image_group(sources, images, {v, m, patch});
  return run.right();
}

void pack_ahead(const WeightView* weights, int64_t steps, int64_t channels, float* packed, const Kernels& kernels) {
  const int64_t panels = panel_count(channels);
  WorkSplit{steps * panels}.for_each([&](int64_t item) {
    const int64_t step = item / panels, panel = item % panels;
    float* const to = packed + step * winograd_floats(channels) + panel * kPanel * channels;
    kernels.pack_winograd(weights[step], channels, to, winograd_point(channels), panel, panel + 1);
  });
}

int64_t chain_barriers(const ChainProblem& problem, const ChainPlan& plan, const Kernels& kernels) {
  ChainData data{};
  data.x_has_border = has_border(problem, plan);
  return Run(problem, plan, data, kernels).barriers();
}

bool run_chain(const ChainProblem& problem, const ChainPlan& plan, const ChainData& data, const Kernels& kernels) {
  const Run run(problem, plan, data, kernels);
  switch (plan.schedule) {
    case Schedule::images:
      run.images();
      break;
    case Schedule::tiles:
      run.tiles();
      break;
    case Schedule::channels:
      run.channels();
      break;
  }
  return run.right();
}

}  // namespace res2net_fused
