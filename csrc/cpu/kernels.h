// The boundary between the program executor and the arithmetic: one table of plain functions per
// instruction set and scalar type. Every kernel works on ONE task, on rows of channels:
//
//   a value of n examples is [n * positions][ld], channels innermost, ld = padded(channels)
//   (the network's input keeps ld = channels: it is only ever read one scalar at a time).
//
// Padding lanes of weights, biases and gradients are zero; those of activations may hold anything
// finite. `share` splits one call over the threads of a team: every thread makes the same call with
// its own part, and no two parts write the same element.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastmaml {

using Index = std::int64_t;

struct Share {
  int part = 0;
  int parts = 1;
};

enum class Activation : int {
  kRelu,
  kLeakyRelu,  // alpha: negative slope
  kElu,        // alpha: scale of the negative part, beta: of its input (celu: 1 / alpha)
  kSelu,
  kGelu,
  kGeluTanh,
  kSilu,
  kSigmoid,
  kTanh,
  kSoftplus,  // alpha: beta, beta: threshold
  kHardtanh,  // alpha: lower bound, beta: upper bound (relu6 is 0, 6)
  kHardsigmoid,
  kHardswish,
  kMish,
  kLogSigmoid,
  kAbs,
  kSquare,
  kCube,
  kReciprocal,
  kSqrt,
  kRsqrt,
  kLength,  // square root of a sum of squares: flat at zero
  kLog,
  kClamp,  // alpha: lower bound, beta: upper bound; unlike hardtanh not flat on its bounds
  kSin,
  kCos,
  kExp,
  kIsPositive,  // 1 where it is so, and 0 elsewhere
  kIsZero,
};

enum class Loss : int { kCrossEntropy, kMeanSquaredError, kMean };

struct ConvGeometry {
  int in_channels, out_channels;
  int height, width, out_height, out_width;
  int kernel_h, kernel_w;
  int stride_h, stride_w;
  int pad_h, pad_w;
  int dilation_h, dilation_w;
};

// What a convolution of n images needs beside its data (row lists, blocking); depends on the
// geometry, n and the lanes of the table that made it. Immutable, shared by threads.
struct ConvPlan;

// `count` elements of an example that come to lie side by side from `to` on, `apart` where they
// come from; behind them are `gap` places that none comes to.
struct Stretch {
  std::int32_t to, count, gap, from, apart;
};
// Where an example's elements go in another layout.
struct Rearrangement {
  Index from_size = 0, to_size = 0;  // of an example
  std::vector<Stretch> stretches;    // in the order of `to`, all places

  bool empty() const { return to_size == 0; }
};
// What happens at the places where elements come to. Gaps are made zero, or left alone.
enum class Moving { kWrite, kWriteLeavingGaps, kAdd };

// A weight along one axis of a kernel, and the place that it multiplies.
struct GroupedTap {
  std::int32_t tap, source;
};
// Places of the destination along one axis that draw on the same taps; `first_tap` of the axis's.
struct GroupedRun {
  std::int32_t first, step, count;
  std::int32_t source_step;  // between what a tap multiplies in one place and in the next
  std::int32_t first_tap, tap_count;
};
struct GroupedAxis {
  const GroupedRun* runs;
  int run_count;
  const GroupedTap* taps;
};
// One direction of a grouped convolution: planes of channels, of each group one, in rows
// [images][planes][height][width][padded(groups)]. Weights, rows of the same, are packed
// [kernel_h][kernel_w][out of a group][in of a group].
struct GroupedSweep {
  Index groups;
  Index in_planes, in_height, in_width;
  Index out_planes, out_height, out_width;
  Index weight_in, weight_out, weight_tap;  // rows from one plane, or tap, to the next
  Index kernel_h, kernel_w;
  GroupedAxis lines;  // a run for each
  GroupedAxis columns;
};

// One pooling window per output position, in input positions [h0, h1) x [w0, w1) (dilated by
// `step`).
struct PoolWindow {
  int h0, h1, w0, w1;
  double scale;  // 1 / divisor for averages
};
struct PoolGeometry {
  int height, width, out_height, out_width;
  int step_h, step_w;
  std::vector<PoolWindow> windows;  // [out_height * out_width]
};

// Images of height x width rows; windows of window x window (1 or 2) rows that do not overlap, as
// many as fit.
struct NormReluShape {
  Index images, height, width, window, channels;
};
// What forward leaves to the other passes. `origin` says where an output comes from: the winner's
// place in its window, or -1 where the ReLU is off; with window 1 it is not used, for the sign of
// gamma * xhat + beta says as much and costs no memory.
template <typename T>
struct NormReluState {
  const T *x, *gamma, *beta;
  T *mean, *variance, *inv_std, *y, *origin;
};
// The same of a tangent: dx may be null; mean(dx) and mean(dx * xhat) are written by
// norm_relu_tangent.
template <typename T>
struct NormReluTangent {
  const T *dx, *dgamma;
  T *mean_dx, *mean_dx_xhat;
};

// `sets` times `positions` rows of channels, `groups` groups of them one after the other: each
// group of a set has a mean and a variance of its own.
struct GroupNormShape {
  Index sets, positions, channels, groups;
};
// What forward leaves to the other passes; inv_std [sets][groups].
template <typename T>
struct GroupNormState {
  const T *gamma, *xhat, *inv_std;
};
// The same of a tangent; dxhat and mean(dx * xhat) [sets][groups] are written by
// group_norm_tangent.
template <typename T>
struct GroupNormTangent {
  const T* dgamma;
  T *dxhat, *mean_dx_xhat;
};

// The coefficients of the inner update rule, see fastmaml/program/updates.py.
enum InnerCoefficient : int {
  kInnerStep,
  kInnerShrink,
  kInnerL2,
  kInnerKeepM,
  kInnerTakeM,
  kInnerKeepV,
  kInnerTakeV,
  kInnerScale,
  kInnerEps,
  kInnerCoefficients
};
// Sums over elements are sums of sums over so many: they do not depend on how work is shared.
constexpr Index kInnerBlock = 1024;

// One inner step of one task: what the rule reads. Elements come in whole vectors.
template <typename T>
struct InnerStep {
  bool nesterov = false, second_moment = false, normalise_first = false;
  T clip_factor = 1;  // on the gradient, before
  T clip_value = 0;   // its bound; infinity for none
  const T* coefficients[kInnerCoefficients] = {};
  bool each[kInnerCoefficients] = {};  // one for each element, or one for all
  const T* theta = nullptr;
  const T* gradient = nullptr;
  const T* m = nullptr;  // null: zeros
  const T* v = nullptr;
};
template <typename T>
struct InnerAdjoint {
  T* theta = nullptr;                // cotangent on theta', becomes the one on theta
  T *m = nullptr, *v = nullptr;      // likewise of the moments; null where the rule has none
  bool has_moments = false;          // false: the cotangents on the new moments are zero
  T* gradient = nullptr;             // cotangent on the gradient, but for the bend of `clip_factor`
  T* each[kInnerCoefficients] = {};  // gradients of coefficients, added to; null: not wanted
  T* sums[kInnerCoefficients] = {};  // the same summed over each block, written
  T* along = nullptr;                // per block <cotangent on the clipped gradient, gradient>
};

// Networks of which each lane of a vector holds another task's: element (i, j) of a matrix is the
// whole vector at `at + (i * row + j * column) * lanes`; of a shared one the number that all tasks
// have, at `at + i * row + j * column`.
template <typename T>
struct LaneMatrix {
  const T* at = nullptr;
  Index row = 0, column = 0;
  bool shared = false;
};
template <typename T>
struct LaneProduct {
  LaneMatrix<T> a, b;
  Index depth;
};
// out[rows][columns] = base + factor * rates * (the sum of all products a b), where rates[i][j] is
// one number for all tasks. base and rates may be absent; out may be base, and no a or b. No a is
// shared.
template <typename T>
struct LaneProducts {
  Index rows, columns;
  LaneProduct<T> products[2];
  int count;
  LaneMatrix<T> base;
  T factor;
  const T* rates;
  Index rates_row;
  T* out;
};

template <typename T>
struct Kernels {
  const char* isa;  // "avx512", "avx2", "neon", "portable"
  int lanes;        // channels are padded to a multiple of this

  // --- matrices ---------------------------------------------------------------------------------
  // c[rows][padded(n)] = (accumulate ? c : 0) + bias + a[rows][k] b[k][padded(n)] + a2 b2.
  // bias and the second pair may be null. lda, lda2: row strides of a and a2.
  void (*matmul)(Index rows, Index k, Index n, const T* a, Index lda, const T* b, const T* a2,
                 Index lda2, const T* b2, const T* bias, T* c, bool accumulate, Share share);
  // c[k][padded(n)] = (accumulate ? c : 0) + sum over rows of a[row][k] b[row][n] (+ a2 b2).
  void (*matmul_tn)(Index rows, Index k, Index n, const T* a, Index lda, const T* b, const T* a2,
                    Index lda2, const T* b2, T* c, bool accumulate, Share share);
  // c[rows][padded(n)] = a[rows][k] b[n][k]^T, for few rows of both; padding is written as zero.
  void (*matmul_nt)(Index rows, Index k, Index n, const T* a, Index lda, const T* b, Index ldb,
                    T* c, Share share);
  // out[padded(n)] = (accumulate ? out : 0) + column sums of a[rows][padded(n)].
  void (*column_sums)(Index rows, Index n, const T* a, T* out, bool accumulate, Share share);
  // taps matrices [k][padded(n)] -> [n][padded(k)]; both sides' padding is written as zero.
  void (*transpose)(Index taps, Index k, Index n, const T* in, T* out, Share share);

  // --- convolution -------------------------------------------------------------------------------
  // Weights packed [kernel_h][kernel_w][in][padded(out)].
  ConvPlan* (*conv_plan)(const ConvGeometry& geometry, Index images);
  void (*conv_plan_free)(ConvPlan* plan);
  // y = bias + x * w (+ x2 * w2). ldx: row stride of x (and x2).
  void (*conv_forward)(const ConvPlan& plan, const T* x, Index ldx, const T* w, const T* x2,
                       const T* w2, const T* bias, T* y, Share share);
  // gx[.][padded(in)] = (accumulate ? gx : 0) + gy * wt (+ gy2 * wt2), wt = transpose(w).
  void (*conv_input_grad)(const ConvPlan& plan, const T* gy, const T* wt, const T* gy2,
                          const T* wt2, T* gx, bool accumulate, Share share);
  void (*conv_weight_grad)(const ConvPlan& plan, const T* x, Index ldx, const T* gy, const T* x2,
                           const T* gy2, T* gw, bool accumulate, Share share);

  // y[.][padded(groups)] = (accumulate ? y : 0) + bias + x * w (+ x2 * w2), bias [planes][groups].
  void (*grouped_conv_sweep)(const GroupedSweep& sweep, Index images, const T* x, const T* w,
                             const T* x2, const T* w2, const T* bias, T* y, bool accumulate,
                             Share share);
  void (*grouped_conv_weight_grad)(const GroupedSweep& forward, Index images, const T* x,
                                   const T* gy, const T* x2, const T* gy2, T* gw, bool accumulate,
                                   Share share);

  // --- batch norm over rows ----------------------------------------------------------------------
  // Channels are padded; gamma, beta and their tangents may be null.
  // Training: writes xhat, y, mean, biased variance and inv_std. xhat may be x itself.
  void (*norm_forward)(Index rows, Index channels, const T* x, const T* gamma, const T* beta, T eps,
                       T* xhat, T* y, T* mean, T* variance, T* inv_std, Share share);
  // ggamma and gbeta are always written (sums of gy*xhat and of gy), padded(channels) each;
  // gx may be null.
  void (*norm_backward)(Index rows, Index channels, const T* gy, const T* xhat, const T* gamma,
                        const T* inv_std, T* gx, bool accumulate, T* ggamma, T* gbeta, Share share);
  // Writes the tangents of xhat and y, and m = mean(dx * xhat) for the call below. dx may be null.
  void (*norm_tangent)(Index rows, Index channels, const T* dx, const T* xhat, const T* gamma,
                       const T* dgamma, const T* dbeta, const T* inv_std, T* dxhat, T* dy, T* m,
                       Share share);
  // ggamma, gbeta: what norm_backward wrote. dgy may be null (zero). dggamma, dgbeta always
  // written.
  void (*norm_backward_tangent)(Index rows, Index channels, const T* gy, const T* dgy,
                                const T* xhat, const T* dxhat, const T* gamma, const T* dgamma,
                                const T* inv_std, const T* m, const T* ggamma, const T* gbeta,
                                T* dgx, bool accumulate, T* dggamma, T* dgbeta, Share share);
  // Evaluation mode: y = gamma * (x - mean) * inv_std + beta with given statistics. The executor
  // reuses norm_eval_forward's xhat below.
  void (*norm_eval_forward)(Index rows, Index channels, const T* x, const T* mean,
                            const T* variance, T eps, const T* gamma, const T* beta, T* xhat, T* y,
                            T* inv_std, Share share);
  void (*norm_eval_backward)(Index rows, Index channels, const T* gy, const T* xhat, const T* gamma,
                             const T* inv_std, T* gx, bool accumulate, T* ggamma, T* gbeta,
                             Share share);
  void (*norm_eval_tangent)(Index rows, Index channels, const T* dx, const T* xhat, const T* gamma,
                            const T* dgamma, const T* dbeta, const T* inv_std, T* dxhat, T* dy,
                            Share share);
  void (*norm_eval_backward_tangent)(Index rows, Index channels, const T* gy, const T* dgy,
                                     const T* xhat, const T* dxhat, const T* gamma, const T* dgamma,
                                     const T* inv_std, T* dgx, bool accumulate, T* dggamma,
                                     T* dgbeta, Share share);

  // --- layer, group and instance norm ------------------------------------------------------------
  // gamma, beta, their tangents, dx, dgy and gx may be null, and xhat may be x itself, as above.
  void (*group_norm_forward)(const GroupNormShape& shape, const T* x, const T* gamma, const T* beta,
                             T eps, T* xhat, T* y, T* inv_std, Share share);
  // ggamma and gbeta, [sets][padded(channels)] here, are always written; whoever wants the
  // parameters' gradients adds up the sets.
  void (*group_norm_backward)(const GroupNormShape& shape, const GroupNormState<T>& state,
                              const T* gy, T* gx, bool accumulate, T* ggamma, T* gbeta,
                              Share share);
  void (*group_norm_tangent)(const GroupNormShape& shape, const GroupNormState<T>& state,
                             const GroupNormTangent<T>& tangent, const T* dx, const T* dbeta, T* dy,
                             Share share);
  // ggamma, gbeta: what group_norm_backward wrote.
  void (*group_norm_backward_tangent)(const GroupNormShape& shape, const GroupNormState<T>& state,
                                      const GroupNormTangent<T>& tangent, const T* gy, const T* dgy,
                                      const T* ggamma, const T* gbeta, T* dgx, bool accumulate,
                                      T* dggamma, T* dgbeta, Share share);

  // --- y = max over windows of relu(batch norm(x)), statistics of the batch ----------------------
  // What norm_* computes without the values in between; gx, gy, dgy, gamma, dgamma, dbeta as there.
  void (*norm_relu_forward)(const NormReluShape& shape, const NormReluState<T>& state, T eps,
                            Share share);
  void (*norm_relu_backward)(const NormReluShape& shape, const NormReluState<T>& state, const T* gy,
                             T* gx, bool accumulate, T* ggamma, T* gbeta, Share share);
  void (*norm_relu_tangent)(const NormReluShape& shape, const NormReluState<T>& state,
                            const NormReluTangent<T>& tangent, const T* dbeta, T* dy, Share share);
  void (*norm_relu_backward_tangent)(const NormReluShape& shape, const NormReluState<T>& state,
                                     const NormReluTangent<T>& tangent, const T* gy, const T* dgy,
                                     const T* ggamma, const T* gbeta, T* dgx, bool accumulate,
                                     T* dggamma, T* dgbeta, Share share);

  // --- pointwise, over count elements (padding included) -----------------------------------------
  void (*act_forward)(Activation kind, T alpha, T beta, Index count, const T* x, T* y, Share share);
  void (*act_backward)(Activation kind, T alpha, T beta, Index count, const T* x, const T* gy,
                       T* gx, bool accumulate, Share share);
  // dy = f'(x) dx
  void (*act_tangent)(Activation kind, T alpha, T beta, Index count, const T* x, const T* dx, T* dy,
                      Share share);
  // dgx = f''(x) dx gy + f'(x) dgy; dx or dgy may be null (zero).
  void (*act_backward_tangent)(Activation kind, T alpha, T beta, Index count, const T* x,
                               const T* dx, const T* gy, const T* dgy, T* dgx, bool accumulate,
                               Share share);
  // --- softmax of rows, or its logarithm, y [rows][padded(columns)] ------------------------------
  // Writes zeros in padding; dgy may be null (zero). `safe`: a row of minus infinities has a
  // softmax of zeros.
  void (*softmax_forward)(bool log, bool safe, Index rows, Index columns, const T* x, T* y,
                          Share share);
  void (*softmax_backward)(bool log, Index rows, Index columns, const T* y, const T* gy, T* gx,
                           bool accumulate, Share share);
  void (*softmax_tangent)(bool log, Index rows, Index columns, const T* y, const T* dx, T* dy,
                          Share share);
  void (*softmax_backward_tangent)(bool log, Index rows, Index columns, const T* y, const T* dy,
                                   const T* gy, const T* dgy, T* dgx, bool accumulate, Share share);

  // --- sums and products of elements -------------------------------------------------------------
  // out = (accumulate ? out : 0) + a * x + b * y; y may be null.
  void (*axpby)(Index count, T a, const T* x, T b, const T* y, T* out, bool accumulate,
                Share share);
  // out = (accumulate ? out : 0) + a[i] * b[i] + c[i] * d[i]; c and d may be null.
  void (*multiply)(Index count, const T* a, const T* b, const T* c, const T* d, T* out,
                   bool accumulate, Share share);
  // out = (accumulate ? out : 0) + (mask[i] > 1/2 ? value : x[i]); x may be null (zero).
  void (*masked_fill)(Index count, const T* mask, const T* x, T value, T* out, bool accumulate,
                      Share share);
  // out = x + a * rate[i] * g[i]; rate may be null (one).
  void (*update)(Index count, T a, const T* rate, const T* x, const T* g, T* out, Share share);

  // --- the inner update rule, over `count` elements, whole vectors ------------------------------
  // Writes theta' and, unless null, the new moments.
  void (*inner_update)(Index count, const InnerStep<T>& step, T* theta, T* m, T* v, Share share);
  void (*inner_adjoint)(Index count, const InnerStep<T>& step, const InnerAdjoint<T>& adjoint,
                        Share share);
  // Per block of kInnerBlock elements: sum of a * b.
  void (*block_products)(Index count, const T* a, const T* b, T* sums, Share share);

  // --- pooling -----------------------------------------------------------------------------------
  // argmax holds the input position of each output element; x and y have rows of `ld`.
  void (*max_pool_forward)(const PoolGeometry& geometry, Index images, Index ld, const T* x, T* y,
                           std::int32_t* argmax, Share share);
  void (*max_pool_backward)(const PoolGeometry& geometry, Index images, Index ld,
                            const std::int32_t* argmax, const T* gy, T* gx, bool accumulate,
                            Share share);
  void (*max_pool_tangent)(const PoolGeometry& geometry, Index images, Index ld,
                           const std::int32_t* argmax, const T* dx, T* dy, Share share);
  void (*avg_pool_forward)(const PoolGeometry& geometry, Index images, Index ld, Index ldx,
                           const T* x, T* y, Share share);
  void (*avg_pool_backward)(const PoolGeometry& geometry, Index images, Index ld, const T* gy,
                            T* gx, bool accumulate, Share share);

  // --- rearranging -------------------------------------------------------------------------------
  // Every share does all that happens to its part of `out`, in calls with other rearrangements,
  // too.
  void (*rearrange)(Index examples, const Rearrangement& arranged, const T* in, T* out, Moving how,
                    Share share);
  // out[i] = (accumulate ? out[i] : 0) + the sum of in at places[starts[i]] to places[starts[i +
  // 1]], for each example.
  void (*gather_sums)(Index examples, Index in_size, Index out_size, const std::int32_t* starts,
                      const std::int32_t* places, const T* in, T* out, bool accumulate,
                      Share share);

  // --- a task in each lane; values are [rows][columns][lanes] -----------------------------------
  void (*lane_products)(const LaneProducts<T>& job);
  // out[i] = (accumulate ? out[i] : 0) + factor * the sum over the first `tasks` lanes of a * b,
  // [count][lanes] each; b may be null (ones).
  void (*lane_sums)(Index count, int tasks, T factor, const T* a, const T* b, T* out,
                    bool accumulate);
  // Losses, mean over rows: targets are values, or for cross-entropy 1 at the label and 0
  // elsewhere. Writes losses [lanes] and the gradient.
  void (*lane_loss_gradient)(Loss kind, Index rows, Index columns, const T* y, const T* targets,
                             T* gy, T* losses);
  void (*lane_loss_tangent)(Loss kind, Index rows, Index columns, const T* y, const T* dy, T* dgy);

  // --- pixels: out = factor * x + shift, rounded after either step; x is never out --------------
  void (*scale_bytes)(Index count, const std::uint8_t* x, T factor, T shift, T* out);
  void (*scale)(Index count, const T* x, T factor, T shift, T* out);

  // --- losses, mean over the task; y [rows][padded(columns)] -------------------------------------
  // Cross-entropy: labels; mean squared error: values [rows][columns]; mean: neither. Returns the
  // loss, writes its gradient (padding zero). Throws std::invalid_argument on a label outside [0,
  // columns).
  T (*loss_gradient)(Loss kind, Index rows, Index columns, const T* y, const std::int64_t* labels,
                     const T* values, T* gy);
  // dgy = (d2 loss / dy2) dy
  void (*loss_tangent)(Loss kind, Index rows, Index columns, const T* y, const T* dy, T* dgy);

  // --- the machine -------------------------------------------------------------------------------
  // So many rounds of independent fused multiply-adds in registers; returns how many
  // multiplications and additions that was. Timed, it is what this processor can do at best.
  double (*fma_rounds)(Index rounds);
};

// The best table this processor runs, or the one FASTMAML_ISA=avx512|avx2|neon|portable names
// (throws std::invalid_argument where the processor cannot run it or the name is unknown).
template <typename T>
const Kernels<T>& kernels();
// The table of one of `runnable_isas()`, whatever the environment says.
template <typename T>
const Kernels<T>& kernels_for(const std::string& isa);
// What was built and this processor can run, best first.
std::vector<std::string> runnable_isas();

inline Index padded(Index n, int lanes) { return (n + lanes - 1) / lanes * lanes; }

}  // namespace fastmaml
