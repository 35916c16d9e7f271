// The kernels of this instruction set, gathered for the dispatcher.
#include "kernels.h"
#include "micro_gemm.h"

#define R2N_NAME_OF(isa) #isa
#define R2N_NAME(isa) R2N_NAME_OF(isa)

namespace res2net_fused::RES2NET_FUSED_ISA {

void winograd_input(const Step&, const TileGrid&, Block, float*, const PointLayout&, int64_t, int64_t);
bool winograd_output(const Step&, const TileGrid&, Block, const float*, float*, float*, int64_t, int64_t);
void winograd_gradient(ConstView, int64_t, const TileGrid&, Block, float*, int64_t, int64_t);
void winograd_weight_gradient(
    int64_t, const TileGrid&, Block, const float*, const float*, float*, float*, float*, int64_t, int64_t, bool);
void direct_rows(const Step&, int64_t, int64_t, int64_t, int64_t);
void copy_rows(ConstView, ConstView, View, int64_t, int64_t, int64_t, int64_t, int64_t);
void pass_rows(ConstView, int64_t, int64_t, View, int64_t, int64_t, int64_t, int64_t, Pool, int64_t, int64_t);
void pointwise_rows(const Pointwise&, int64_t, int64_t, int64_t, int64_t);
void norm_moments(const float*, int64_t, int64_t, int64_t, float*, float*);
void norm_forward(const NormForward&, int64_t, int64_t);
void activation_backward(const NormBackward&, int64_t, int64_t);
void norm_backward_sums(const NormBackward&, int64_t, int64_t, float*, float*);
void norm_backward_apply(const NormBackward&, int64_t, int64_t);
void pack_winograd(const WeightView&, int64_t, float*, int64_t, int64_t, int64_t);
void pack_direct(const float*, int64_t, int64_t, float*, int64_t, int64_t);
void pack_pointwise(const float*, int64_t, int64_t, float*, int64_t, int64_t);
void convolve_row(const RowConvolution&, const float* const*, float*, int64_t);
void max_row(const MaxRow&, const float* const*, float*);

const Kernels kernels = {
    R2N_NAME(RES2NET_FUSED_ISA),
    kMaxPanels,
    winograd_input,
    winograd_output,
    winograd_gradient,
    winograd_weight_gradient,
    direct_rows,
    copy_rows,
    pass_rows,
    pointwise_rows,
    pack_winograd,
    pack_direct,
    norm_moments,
    norm_forward,
    activation_backward,
    norm_backward_sums,
    norm_backward_apply,
    pack_pointwise,
    convolve_row,
    max_row,
};

}  // namespace res2net_fused::RES2NET_FUSED_ISA
