// Images shared out in groups: what blocks and chains do alike where a thread takes images through all of it.
#pragma once

#include "cpu/chain/plan.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/work_split.h"

namespace res2net_fused {

// Calls begin(memory) for each part of the plan, with `each` floats of its own, and what that returns, f(first image, images),
// for each group that the part takes.
template <class Begin>
void for_image_groups(const ChainPlan& plan, int64_t batch, int64_t each, const Begin& begin) {
  const Scratch scratch(each * plan.parts);
  const WorkSplit groups{plan.image_groups(batch)};
  WorkStealing work(groups.count, plan.parts);
  WorkSplit{plan.parts}.for_each([&](int64_t part) {
    const auto run = begin(scratch.data() + part * each);
    work.work(part, [&](int64_t group) {
      const Block images = groups.block(batch, group);
      run(images.first, images.count);
    });
  });
}

}  // namespace res2net_fused
