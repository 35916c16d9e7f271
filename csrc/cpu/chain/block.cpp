#include "cpu/chain/block.h"

#include <algorithm>

#include "cpu/chain/image_groups.h"
#include "cpu/chain/padded_images.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/work_split.h"

namespace res2net_fused {
namespace {

constexpr int64_t kRowsOfPass = 100;  // of pixels that a thread takes at a time by one pass of channels, at most
constexpr int64_t kFewestRows = 12;   // fewer would not pay for reading the weights once more

// u = relu(conv1(x)) and y = chain(u) of some images: (images, H, W, room), a pixel's channels padded to whole panels so that
// nothing that is stored there needs a mask; u between zero borders where `has_border`. Also the pixels that a strided
// projection reads, side by side.
class Middle {
 public:
  Middle(const ChainProblem& problem, const ChainPlan& plan, const BlockData& block, int64_t images)
      : problem_(problem), images_(images), border_(has_border(problem, plan) ? 1 : 0) {
    const int64_t out_pixels = images * problem.out_height() * problem.out_width();
    room_ = round_up(problem.scale() * problem.channels, kPanel);
    row_ = (problem.width + 2 * border_) * room_;
    image_ = (problem.height + 2 * border_) * row_;
    u_floats_ = images * image_;
    y_floats_ = out_pixels * room_;
    picked_floats_ = block.projection != nullptr && block.projection_stride > 1 ? out_pixels * block.shortcut_planes : 0;
  }

  int64_t floats() const { return u_floats_ + y_floats_ + picked_floats_; }
  void place(float* memory) { memory_ = memory; }

  int64_t room() const { return room_; }
  float* u() const { return memory_ + border_ * (row_ + room_); }
  OutBorder border() const {
    if (border_ == 0) return {};
    return {problem_.width, problem_.height, 2 * border_ * room_, 2 * border_ * row_};
  }
  // Once: nobody writes there.
  void zero_border() const {
    if (border_ > 0) zero_around(memory_, images_, problem_.height, problem_.width, border_, border_, room_);
  }
  float* y() const { return memory_ + u_floats_; }
  float* picked() const { return y() + y_floats_; }

  ChainData chain(const BlockData& block) const {
    const int64_t out_row = problem_.out_width() * room_;
    ChainData data{};
    data.x = {u(), image_, row_, room_};
    data.x_has_border = border_ > 0;
    data.out = {y(), problem_.out_height() * out_row, out_row, room_};
    data.room = room_;
    data.winograd = block.winograd;
    data.direct = block.direct;
    data.bias = block.bias;
    return data;
  }

 private:
  const ChainProblem& problem_;
  const int64_t images_, border_;
  int64_t room_, row_, image_, u_floats_, y_floats_, picked_floats_;
  float* memory_ = nullptr;
};

class BlockRun {
 public:
  BlockRun(const ChainProblem& problem, const ChainPlan& plan, const BlockData& data, const Kernels& kernels)
      : problem_(problem), plan_(plan), data_(data), kernels_(kernels) {
    plan_.brings_near = false;  // what the chain reads has just been written
  }

  void images() const;
  void together() const;

 private:
  int64_t pixels(int64_t images) const { return images * problem_.height * problem_.width; }
  int64_t out_pixels(int64_t images) const { return images * problem_.out_height() * problem_.out_width(); }

  Pointwise conv1(const Middle& middle, int64_t first_image, int64_t images) const {
    Pointwise p{};
    p.rows = pixels(images);
    p.sources[0] = {data_.x + pixels(first_image) * data_.inplanes, data_.inplanes, data_.inplanes, data_.conv1};
    p.bias = data_.conv1_bias;
    p.out = middle.u();
    p.out_pitch = middle.room();
    p.border = middle.border();
    p.columns = problem_.scale() * problem_.channels;
    p.full_vectors = p.relu = true;
    return p;
  }

  Pointwise conv3(const Middle& middle, int64_t first_image, int64_t images) const {
    Pointwise p{};
    p.rows = out_pixels(images);
    p.sources[0] = {middle.y(), middle.room(), problem_.scale() * problem_.channels, data_.conv3};
    p.bias = data_.conv3_bias;
    p.columns = p.out_pitch = p.shortcut_pitch = data_.outplanes;
    const int64_t planes = data_.shortcut_planes;
    if (data_.projection == nullptr) {
      p.shortcut = data_.shortcut == nullptr ? nullptr : data_.shortcut + out_pixels(first_image) * data_.outplanes;
    } else if (data_.projection_stride > 1) {
      p.sources[1] = {middle.picked(), planes, planes, data_.projection};
    } else {
      p.sources[1] = {data_.shortcut + out_pixels(first_image) * planes, planes, planes, data_.projection};
    }
    p.out = data_.out + out_pixels(first_image) * data_.outplanes;
    p.relu = data_.relu;
    return p;
  }

  bool picks() const { return data_.projection != nullptr && data_.projection_stride > 1; }
  // Rows of pixels that a strided projection reads, counted over the images from first_image on.
  void pick(const Middle& middle, int64_t first_image, int64_t first_row, int64_t last_row) const {
    const int64_t planes = data_.shortcut_planes, stride = data_.projection_stride;
    const int64_t row = data_.shortcut_width * planes, image = data_.shortcut_height * row;
    const int64_t height = problem_.out_height(), width = problem_.out_width();
    kernels_.copy_rows(
        {data_.shortcut + first_image * image, image, stride * row, stride * planes}, {},
        {middle.picked(), height * width * planes, width * planes, planes}, height, width, planes, first_row, last_row);
  }

  // All rows, by all threads: the larger of the two operands is shared out.
  void pointwise(const Pointwise& p) const {
    const int64_t panels = panel_count(p.columns), threads = thread_count(), most = p.rows / kFewestRows;
    if (p.rows >= p.columns) {
      const WorkSplit rows{row_cuts(p.rows, 1, divide_up(p.rows, pointwise_block(p)), most, threads)};
      share_out(rows.count, threads, [&](int64_t, int64_t unit) {
        kernels_.pointwise_rows(p, rows.share(p.rows, unit), rows.share(p.rows, unit + 1), 0, panels);
      });
      return;
    }
    // A pass of panels, and not all rows where there are many: else the last units would take too long.
    const WorkSplit passes{std::max<int64_t>(divide_up(p.columns / kPanel, kernels_.panels_per_pass), 1)};
    const WorkSplit rows{row_cuts(p.rows, passes.count, divide_up(p.rows, kRowsOfPass), most, threads)};
    share_out(passes.count * rows.count, threads, [&](int64_t, int64_t unit) {
      const int64_t pass = unit / rows.count, part = unit % rows.count;
      const int64_t first = rows.share(p.rows, part), last = rows.share(p.rows, part + 1);
      kernels_.pointwise_rows(p, first, last, passes.share(panels, pass), passes.share(panels, pass + 1));
    });
  }

  const ChainProblem& problem_;
  ChainPlan plan_;
  const BlockData& data_;
  const Kernels& kernels_;
};

// Each thread takes images through the whole block, plan.images at a time.
void BlockRun::images() const {
  const Middle shape(problem_, plan_, data_, plan_.images);
  const int64_t chain_floats = ImageChain::scratch_floats(problem_, plan_, kernels_);
  const int64_t each = chain_floats + round_up(shape.floats(), 1024);
  for_image_groups(plan_, problem_.batch, each, [&](float* memory) {
    Middle middle = shape;
    middle.place(memory + chain_floats);
    middle.zero_border();
    return [this, middle, chain = ImageChain(problem_, plan_, kernels_, memory)](int64_t n, int64_t images) {
      const Pointwise before = conv1(middle, n, images), behind = conv3(middle, n, images);
      kernels_.pointwise_rows(before, 0, before.rows, 0, panel_count(before.columns));
      chain.run(middle.chain(data_), images);
      if (picks()) pick(middle, n, 0, images * problem_.out_height());
      kernels_.pointwise_rows(behind, 0, behind.rows, 0, panel_count(behind.columns));
    };
  });
}

// All threads on one part of the block after the other.
void BlockRun::together() const {
  Middle middle(problem_, plan_, data_, problem_.batch);
  const Scratch scratch(middle.floats());
  middle.place(scratch.data());
  middle.zero_border();
  pointwise(conv1(middle, 0, problem_.batch));
  run_chain(problem_, plan_, middle.chain(data_), kernels_);
  if (picks()) {
    const int64_t rows = problem_.batch * problem_.out_height();
    share_out(rows, thread_count(), [&](int64_t, int64_t row) { pick(middle, 0, row, row + 1); });
  }
  pointwise(conv3(middle, 0, problem_.batch));
}

}  // namespace

void run_block(const ChainProblem& problem, const ChainPlan& plan, const BlockData& data, const Kernels& kernels) {
  const BlockRun run(problem, plan, data, kernels);
  plan.schedule == Schedule::images ? run.images() : run.together();
}

}  // namespace res2net_fused
