// The public face of the native core. Knows no Python and no torch: tensors are pointers to
// contiguous memory in torch's own layout, of the program's dtype (labels are int64). A null
// pointer means "absent". Errors are std::invalid_argument (a wrong argument) or
// std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "fastmaml/episode.h"

namespace fastmaml {

using Index = std::int64_t;
using Shape = std::vector<Index>;

enum class DType { kFloat32, kFloat64 };

using Attribute = std::variant<bool, Index, double, std::string, std::vector<Index>>;

// One operation of a program. `params` and `buffers` are slot numbers, or -1 where absent.
struct OpSpec {
  std::string kind;
  std::vector<int> inputs;
  int output = -1;
  std::vector<int> params;
  std::vector<int> buffers;
  std::map<std::string, Attribute> attributes;
};

// A parameter: a piece of theta (one copy per task) where `adapted`, else of phi (one for all).
// `swapped`: a weight that lies there as its transpose does, [in][out] and its taps from the last
// to the first.
struct SlotSpec {
  Shape shape;
  bool adapted = true;
  Index offset = 0;
  bool swapped = false;
};

// A module as a list of ops. Shapes are per example; value 0 is the input. Buffers lie one after
// the other, in order. theta_size and shared_size may exceed what the slots cover (-1: just that).
struct ProgramSpec {
  DType dtype = DType::kFloat32;
  std::vector<Shape> values;
  std::vector<OpSpec> ops;
  std::vector<SlotSpec> slots;
  std::vector<Shape> buffers;
  int output = 0;
  Index theta_size = -1;
  Index shared_size = -1;
};

// Elements of theta, of phi, of one row of statistics, and of all buffers.
struct ProgramSizes {
  Index theta = 0;
  Index shared = 0;
  Index stats = 0;
  Index buffers = 0;
  Index packed_theta = 0;  // of theta as the kernels read it, see ForwardArgs::packed
};

// What forward, backward and tangent leave behind for the calls that follow them. They own all the
// memory they refer to, but for packed parameters and directions, which stay the caller's.
class Context {
 public:
  virtual ~Context() = default;
};
class Gradient {
 public:
  virtual ~Gradient() = default;
};
class Tangent {
 public:
  virtual ~Tangent() = default;
};

// y = f(theta, x). theta_stride: elements from one task's theta to the next (0: all share one).
struct ForwardArgs {
  const void* theta = nullptr;
  Index theta_stride = 0;
  const void* shared = nullptr;
  const void* buffers = nullptr;
  const void* x = nullptr;  // [tasks, examples, *input]
  Index tasks = 0;
  Index examples = 0;
  void* y = nullptr;      // [tasks, examples, *output]
  void* stats = nullptr;  // [tasks, sizes.stats]
  int threads = 1;
  bool keep = true;  // false: no Context is returned
  // theta, and gtheta, dtheta and dgtheta of the calls that follow, are rows of sizes.packed_theta
  // elements from pack_theta: nothing is rearranged. Sums of such rows are such rows.
  bool packed = false;
};

// The gradient of <gy, y>. Only what is asked for is computed.
struct BackwardArgs {
  const void* gy = nullptr;
  void* gtheta = nullptr;   // [tasks, sizes.theta]
  void* gshared = nullptr;  // [sizes.shared], summed over tasks
  void* gx = nullptr;       // like x
  int threads = 1;
  bool keep = true;  // false: no Gradient is returned
};

// The directional derivative of y along (dtheta, dshared, dx); null directions are zero.
struct TangentArgs {
  const void* dtheta = nullptr;
  Index dtheta_stride = 0;
  const void* dshared = nullptr;
  const void* dx = nullptr;
  void* dy = nullptr;
  int threads = 1;
  bool keep = true;  // false: no Tangent is returned
};

// The derivative of backward's results along a Tangent and dgy (null: zero).
struct BackwardTangentArgs {
  const void* dgy = nullptr;
  void* dgtheta = nullptr;
  void* dgshared = nullptr;
  void* dgx = nullptr;
  int threads = 1;
  bool sum_theta = false;  // dgtheta is one row, the sum over tasks
};

// kMean: of the outputs, whatever the targets.
enum class TaskLoss { kCrossEntropy, kMeanSquaredError, kMean };

// One coefficient of an inner update rule.
struct InnerCoefficientArgs {
  const void* values = nullptr;  // [rows, each ? sizes.theta : 1]
  Index rows = 1;                // 1 (every step alike) or the number of steps
  bool each = false;             // one for each element
  void* gradient = nullptr;      // like values, mean over tasks; null: not wanted
};

// An inner update rule other than a gradient step: momentum, Adam, RMSprop. What the parts mean,
// and the order of the coefficients, stands in fastmaml/program/updates.py.
struct InnerUpdateArgs {
  bool momentum = false, nesterov = false, second_moment = false, normalise_first = false;
  double clip_norm = 0;   // of each task's gradient; 0: none
  double clip_value = 0;  // of each element of it; 0: none
  std::vector<InnerCoefficientArgs> coefficients;
};

// The losses after `steps` inner gradient steps, and their exact gradient, averaged over tasks.
// The inner learning rate of element i at step k is rate * rates[k][i].
struct MetaStepArgs {
  const void* theta = nullptr;  // [sizes.theta], where every task starts
  Index theta_stride = 0;       // elements from one task's start to the next; 0: all start alike
  const void* shared = nullptr;
  const void* buffers = nullptr;
  const void* support_x = nullptr;
  const void* support_y = nullptr;  // int64 labels, or values like the output
  Index support_examples = 0;
  Index support_batches = 1;  // support sets one after the other; step k takes k % support_batches
  const void* query_x = nullptr;
  const void* query_y = nullptr;
  Index query_examples = 0;  // 0: adaptation only
  Index tasks = 0;
  Index steps = 1;
  TaskLoss loss = TaskLoss::kCrossEntropy;
  bool first_order = false;
  double rate = 0;
  const void* rates = nullptr;              // [rate_steps, sizes.theta]; null: ones
  Index rate_steps = 1;                     // 1 (every step alike) or `steps`
  const InnerUpdateArgs* update = nullptr;  // takes the inner steps, instead of the rates
  void* losses = nullptr;                   // [tasks]
  void* mean_loss = nullptr;                // [1], of `losses`
  // [sizes.theta], mean over tasks; with starts of their own [tasks, sizes.theta], its summands
  void* gtheta = nullptr;
  void* gshared = nullptr;      // [sizes.shared], mean over tasks
  void* grates = nullptr;       // [rate_steps, sizes.theta], mean over tasks
  void* stats = nullptr;        // [tasks, steps (+ 1 with a query), sizes.stats], in call order
  void* adapted = nullptr;      // [tasks, sizes.theta]
  void* predictions = nullptr;  // [tasks, query_examples, *output]
  int threads = 1;
  // Activations of as many steps as fit are kept for the adjoint; the others are recomputed.
  std::size_t memory_budget_bytes = std::size_t{1} << 30;
};

// A compiled program. Calls may come from several threads at once; one call at a time runs.
class Program {
 public:
  virtual ~Program() = default;
  virtual ProgramSizes sizes() const = 0;
  virtual std::shared_ptr<Context> forward(const ForwardArgs& args) = 0;
  virtual std::shared_ptr<Gradient> backward(Context& context, const BackwardArgs& args) = 0;
  virtual std::shared_ptr<Tangent> tangent(Context& context, const TangentArgs& args) = 0;
  virtual void backward_tangent(Context& context, Gradient& gradient, Tangent& tangent,
                                const BackwardTangentArgs& args) = 0;
  virtual void meta_step(const MetaStepArgs& args) = 0;
  // As many of `threads` as the work of that many forward passes keeps busy: threads that wait for
  // each other longer than they compute make a call slower.
  virtual int useful_threads(Index tasks, Index examples, Index passes, int threads) const = 0;
  // Whether the meta-steps of so many tasks, of at most so many examples each, run with a task in
  // each lane of the vectors, where nothing else stands against it.
  virtual bool suits_lanes(Index tasks, Index examples) const = 0;
  // Rows of theta from torch's layout to the kernels', and back.
  virtual void pack_theta(const void* theta, Index rows, void* packed, int threads) = 0;
  virtual void unpack_theta(const void* packed, Index rows, void* theta, int threads) = 0;
  // Equal for programs that pack theta alike.
  virtual std::vector<Index> packing() const = 0;
};

// Throws std::invalid_argument, naming the op and the argument, where the spec is inconsistent.
std::shared_ptr<Program> make_program(const ProgramSpec& spec);

enum class Pixel { kByte, kFloat, kDouble, kTwoBytes };

// Images that episodes are drawn from, [count, channels, plane]. A batch holds
// `factors * x + shifts`, rounded after either step: bytes as floats, floats and doubles as what
// they are. Without factors values stay as they are, bytes excepted; elements of two bytes must.
struct ImageStore {
  const void* images = nullptr;
  Pixel pixel = Pixel::kByte;
  Index channels = 1;
  Index plane = 0;
  const double* factors = nullptr;  // [channels], and so for shifts
  const double* shifts = nullptr;
};

// Batches of episodes. Per task: `ways` classes, and of each `shots` support and `queries` query
// images, all without replacement (see episode.h). Task 0 of a batch is `first_task` of the stream.
struct EpisodeSpec {
  ImageStore store;
  const Index* members = nullptr;  // positions of images, class by class
  const Index* counts = nullptr;   // [classes]
  Index classes = 0;
  Index ways = 0, shots = 0, queries = 0, tasks = 0;
  Rotations rotations = Rotations::kNone;
  Index first_task = 0;
};

// Draws the batches of a spec, of which it keeps all but the images themselves.
class EpisodeDrawer {
 public:
  // Throws std::invalid_argument where the sizes do not fit together.
  explicit EpisodeDrawer(const EpisodeSpec& spec);
  EpisodeDrawer(const EpisodeDrawer&) = delete;  // spec_ points into its vectors
  EpisodeDrawer& operator=(const EpisodeDrawer&) = delete;

  // support_x [tasks, ways * shots, channels, plane], query_x likewise. Calls may come from several
  // threads at once. The result does not depend on `threads`.
  void draw(std::uint64_t seed, std::uint64_t batch, void* support_x, void* query_x,
            int threads) const;

 private:
  template <typename In, typename Out>
  void draw_as(std::uint64_t seed, std::uint64_t batch, Out* support_x, Out* query_x,
               int threads) const;

  EpisodeSpec spec_;
  std::vector<Index> members_, starts_, counts_;
  std::vector<double> factors_, shifts_;
};

// Back through a gradient step, theta - rate * gradient for each of the tasks, from a theta that
// they share.
struct StepAdjointArgs {
  DType dtype = DType::kFloat32;
  const void* cotangent = nullptr;  // [tasks, size]
  Index tasks = 0;
  Index size = 0;
  double rate = 0;
  void* dgradient = nullptr;  // [tasks, size], -rate * cotangent; null: not wanted
  void* sum = nullptr;        // [size], of the cotangents over tasks, in their order
  int threads = 1;
};
void step_adjoint(const StepAdjointArgs& args);

// What calls of batch norms report, folded into the running statistics one call after the other:
// r <- (1 - momentum) r + momentum * reported.
struct RunningBuffer {
  void* data = nullptr;
  Index size = 0;
};
struct FoldArgs {
  DType dtype = DType::kFloat32;
  const void* rows = nullptr;  // [calls, width], in each the values of all buffers in order
  Index calls = 0;
  Index width = 0;
  std::vector<RunningBuffer> buffers;
  std::vector<std::int64_t*> counts;  // of calls
  double momentum = 0;
};
// Throws std::invalid_argument where the buffers are not as wide as a row.
void fold_statistics(const FoldArgs& args);

// GFLOP/s of float32 fused multiply-adds in the registers of so many threads: the measure that
// timings are held against. Takes some tenths of a second.
double fma_peak(int threads);

// Nanoseconds for a cache line to go to another core and back: what threads that share a task pay
// wherever one reads what the other wrote.
double handover_ns();

}  // namespace fastmaml
