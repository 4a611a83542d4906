// The table of one instruction set.
#include "activation.h"
#include "conv2d.h"
#include "gemm.h"
#include "group_norm.h"
#include "grouped_conv.h"
#include "inner_update.h"
#include "lanes.h"
#include "loss.h"
#include "masked_fill.h"
#include "mul.h"
#include "norm.h"
#include "norm_relu.h"
#include "peak.h"
#include "pixels.h"
#include "pool.h"
#include "shape.h"
#include "softmax.h"

#define FASTMAML_STRING_(x) #x
#define FASTMAML_STRING(x) FASTMAML_STRING_(x)

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
const Kernels<T>& table() {
  static const Kernels<T> kTable = {
      FASTMAML_STRING(FASTMAML_ISA),
      kLanes<T>,
      &matmul<T>,
      &matmul_tn<T>,
      &matmul_nt<T>,
      &column_sums<T>,
      &transpose<T>,
      &conv_plan<T>,
      &free_conv_plan,
      &conv_forward<T>,
      &conv_input_grad<T>,
      &conv_weight_grad<T>,
      &grouped_conv_sweep<T>,
      &grouped_conv_weight_grad<T>,
      &norm_forward<T>,
      &norm_backward<T>,
      &norm_tangent<T>,
      &norm_backward_tangent<T>,
      &norm_eval_forward<T>,
      &norm_eval_backward<T>,
      &norm_eval_tangent<T>,
      &norm_eval_backward_tangent<T>,
      &group_norm_forward<T>,
      &group_norm_backward<T>,
      &group_norm_tangent<T>,
      &group_norm_backward_tangent<T>,
      &norm_relu_forward<T>,
      &norm_relu_backward<T>,
      &norm_relu_tangent<T>,
      &norm_relu_backward_tangent<T>,
      &act_forward<T>,
      &act_backward<T>,
      &act_tangent<T>,
      &act_backward_tangent<T>,
      &softmax_forward<T>,
      &softmax_backward<T>,
      &softmax_tangent<T>,
      &softmax_backward_tangent<T>,
      &axpby<T>,
      &multiply<T>,
      &masked_fill<T>,
      &update<T>,
      &inner_update<T>,
      &inner_adjoint<T>,
      &block_products<T>,
      &max_pool_forward<T>,
      &max_pool_backward<T>,
      &max_pool_tangent<T>,
      &avg_pool_forward<T>,
      &avg_pool_backward<T>,
      &rearrange<T>,
      &gather_sums<T>,
      &lane_products<T>,
      &lane_sums<T>,
      &lane_loss_gradient<T>,
      &lane_loss_tangent<T>,
      &scale_bytes<T>,
      &scale<T>,
      &loss_gradient<T>,
      &loss_tangent<T>,
      &fma_rounds<T>,
  };
  return kTable;
}

template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
