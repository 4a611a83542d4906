// The four operations against central finite differences of each other, in double.
#include <stdexcept>

#include "check.h"
#include "differences.h"
#include "program_cases.h"

namespace {

using namespace fastmaml_test;
using fastmaml::Program;
using fastmaml::ProgramSizes;

using Values = std::vector<double>;

constexpr Index kTasks = 3, kExamples = 4;

struct Point {
  Values theta, phi, x, gy;

  Point moved(const Point& direction, double by) const {
    Point out = *this;
    const auto move = [by](Values& value, const Values& along) {
      for (std::size_t i = 0; i < value.size(); ++i) value[i] += by * along[i];
    };
    move(out.theta, direction.theta);
    move(out.phi, direction.phi);
    move(out.x, direction.x);
    move(out.gy, direction.gy);
    return out;
  }
};

struct Gradients {
  Values theta, phi, x;
};

struct Setup {
  explicit Setup(const ProgramCase& c)
      : name(c.name),
        program(make_program(c.spec)),
        sizes(program->sizes()),
        input_size(element_count(c.spec.values[0])),
        output_size(element_count(c.spec.values[c.spec.output])),
        buffers(random_values<double>(sizes.buffers)) {
    for (double& value : buffers) value = 0.5 + std::fabs(value);
  }

  Point random_point() const {
    return {random_values<double>(kTasks * sizes.theta, 0.5), random_values<double>(sizes.shared),
            random_values<double>(kTasks * kExamples * input_size),
            random_values<double>(kTasks * kExamples * output_size)};
  }
  Gradients poisoned_gradients() const {
    return {poisoned<double>(kTasks * sizes.theta), poisoned<double>(sizes.shared),
            poisoned<double>(kTasks * kExamples * input_size)};
  }

  std::shared_ptr<fastmaml::Context> forward(const Point& at, Values* y, int threads = 1) const {
    *y = poisoned<double>(kTasks * kExamples * output_size);
    fastmaml::ForwardArgs args;
    args.theta = at.theta.data();
    args.theta_stride = sizes.theta;
    args.shared = at.phi.data();
    args.buffers = buffers.data();
    args.x = at.x.data();
    args.tasks = kTasks;
    args.examples = kExamples;
    args.y = y->data();
    args.threads = threads;
    return program->forward(args);
  }

  std::shared_ptr<fastmaml::Gradient> backward(fastmaml::Context& context, const Point& at,
                                               Gradients* out, int threads = 1) const {
    *out = poisoned_gradients();
    fastmaml::BackwardArgs args;
    args.gy = at.gy.data();
    args.gtheta = out->theta.data();
    args.gshared = sizes.shared > 0 ? out->phi.data() : nullptr;
    args.gx = out->x.data();
    args.threads = threads;
    return program->backward(context, args);
  }

  Values output(const Point& at) const {
    Values y;
    forward(at, &y);
    return y;
  }
  Gradients gradients(const Point& at) const {
    Values y;
    Gradients out;
    backward(*forward(at, &y), at, &out);
    return out;
  }

  std::string name;
  std::shared_ptr<Program> program;
  ProgramSizes sizes;
  Index input_size, output_size;
  Values buffers;
};

// A swapped weight gives what its transpose gives.
void check_swapped() {
  ProgramBuilder plain({3, 4, 5}), swapped({3, 4, 5});
  plain.conv2d(0, 2, 3, 1, 1, 1, false);
  swapped.swapped(swapped.conv2d(0, 2, 3, 1, 1, 1, false));
  const Setup first({"plain", plain.spec()}), second({"swapped", swapped.spec()});
  Point at = first.random_point(), moved = at;
  for (Index task = 0; task < kTasks; ++task) {
    for (Index i = 0; i < 2 * 3 * 9; ++i) {
      const Index out = i / 27, in = i / 9 % 3, tap = i % 9;
      moved.theta[task * 54 + (in * 2 + out) * 9 + 8 - tap] = at.theta[task * 54 + i];
    }
  }
  check_close(second.output(moved), first.output(at), 1, "a swapped weight", 1);
}

// The derivative of f at `at` along a direction.
template <typename Function>
Values derivative(double step, const Point& at, const Point& along, const Function& f) {
  return central_difference(step, [&](double by) { return f(at.moved(along, by)); });
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

void check_operations(const ProgramCase& c, int threads) {
  const Setup setup(c);
  const Point at = setup.random_point(), along = setup.random_point();
  const double step = difference_step(c), units = difference_units(c);
  const std::string name = c.name + ", " + std::to_string(threads) + " threads: ";
  Values y;
  const auto context = setup.forward(at, &y, threads);
  Gradients got;
  const auto gradient = setup.backward(*context, at, &got, threads);

  const Values expected_dy =
      derivative(step, at, along, [&](const Point& point) { return setup.output(point); });
  const double slope = dot(got.theta, along.theta) + dot(got.phi, along.phi) + dot(got.x, along.x);
  check_close<double>({slope}, {dot(at.gy, expected_dy)}, units, name + "backward", 1);

  Values dy = poisoned<double>(static_cast<Index>(y.size()));
  fastmaml::TangentArgs tangent_args;
  tangent_args.dtheta = along.theta.data();
  tangent_args.dtheta_stride = setup.sizes.theta;
  tangent_args.dshared = setup.sizes.shared > 0 ? along.phi.data() : nullptr;
  tangent_args.dx = along.x.data();
  tangent_args.dy = dy.data();
  tangent_args.threads = threads;
  const auto tangent = setup.program->tangent(*context, tangent_args);
  check_close(dy, expected_dy, units, name + "tangent");

  Gradients second = setup.poisoned_gradients();
  fastmaml::BackwardTangentArgs args;
  args.dgy = along.gy.data();
  args.dgtheta = second.theta.data();
  args.dgshared = setup.sizes.shared > 0 ? second.phi.data() : nullptr;
  args.dgx = second.x.data();
  args.threads = threads;
  setup.program->backward_tangent(*context, *gradient, *tangent, args);
  const auto expected = [&](Values Gradients::* part) {
    return derivative(step, at, along,
                      [&](const Point& point) { return setup.gradients(point).*part; });
  };
  check_close(second.theta, expected(&Gradients::theta), units, name + "second, theta");
  check_close(second.phi, expected(&Gradients::phi), units, name + "second, phi", 1);
  check_close(second.x, expected(&Gradients::x), units, name + "second, x");
}

// What the tangent did not move, and a zero dgy, must be the same as zeros passed explicitly.
void check_absent_is_zero(const ProgramCase& c) {
  const Setup setup(c);
  const Point at = setup.random_point(), along = setup.random_point();
  const Values no_phi(at.phi.size(), 0), no_x(at.x.size(), 0), no_gy(at.gy.size(), 0);
  Values y;
  const auto context = setup.forward(at, &y);
  Gradients ignored;
  const auto gradient = setup.backward(*context, at, &ignored);
  const auto second = [&](bool absent) {
    fastmaml::TangentArgs tangent_args;
    tangent_args.dtheta = along.theta.data();
    tangent_args.dtheta_stride = setup.sizes.theta;
    tangent_args.dshared = absent || setup.sizes.shared == 0 ? nullptr : no_phi.data();
    tangent_args.dx = absent ? nullptr : no_x.data();
    tangent_args.dy = y.data();
    const auto tangent = setup.program->tangent(*context, tangent_args);
    Gradients out = setup.poisoned_gradients();
    fastmaml::BackwardTangentArgs args;
    args.dgy = absent ? nullptr : no_gy.data();
    args.dgtheta = out.theta.data();
    args.dgshared = setup.sizes.shared > 0 ? out.phi.data() : nullptr;
    args.dgx = out.x.data();
    setup.program->backward_tangent(*context, *gradient, *tangent, args);
    return out;
  };
  const Gradients absent = second(true), zero = second(false);
  check_close(absent.theta, zero.theta, 100, c.name + ": absent directions, theta");
  check_close(absent.phi, zero.phi, 100, c.name + ": absent directions, phi", 1);
  check_close(absent.x, zero.x, 100, c.name + ": absent directions, x");
}

// Shared theta (stride 0) gives what the same theta written out for every task gives.
void check_shared_theta(const ProgramCase& c) {
  const Setup setup(c);
  Point at = setup.random_point();
  for (Index i = setup.sizes.theta; i < kTasks * setup.sizes.theta; ++i) {
    at.theta[i] = at.theta[i - setup.sizes.theta];
  }
  const Values expected = setup.output(at);
  Values y = poisoned<double>(static_cast<Index>(expected.size()));
  fastmaml::ForwardArgs args;
  args.theta = at.theta.data();
  args.shared = at.phi.data();
  args.buffers = setup.buffers.data();
  args.x = at.x.data();
  args.tasks = kTasks;
  args.examples = kExamples;
  args.y = y.data();
  args.keep = false;
  check(setup.program->forward(args) == nullptr, c.name + ": a context was kept");
  check(y == expected, c.name + ": shared theta differs");
}

// A ReLU works in place where it can. Clamping at zero and a number out of reach is the same
// function and never does.
void check_in_place(const ProgramSpec& relu, const ProgramSpec& clamp) {
  generator().seed(1);
  const Setup in_place({"relu", relu});
  generator().seed(1);
  const Setup plain({"clamp", clamp});
  const Point at = plain.random_point();
  const Gradients got = in_place.gradients(at), expected = plain.gradients(at);
  check(in_place.output(at) == plain.output(at), "in place: output");
  check(got.theta == expected.theta && got.x == expected.x, "in place: gradients");
}

// A product with itself, one factor of which is a constant, or not: then everything is twice that.
ProgramSpec squared(bool detached) {
  ProgramBuilder p({3, 4, 5});
  const int h = p.activation(p.conv2d(0, 17), "tanh");
  p.linear(p.flatten(p.mul(h, detached ? p.detach(h) : h)), 3);
  return p.spec();
}

void check_detached() {
  generator().seed(1);
  const Setup half({"detached", squared(true)});
  generator().seed(1);
  const Setup whole({"squared", squared(false)});
  const Point at = whole.random_point();
  Gradients got = half.gradients(at);
  const Gradients expected = whole.gradients(at);
  check(half.output(at) == whole.output(at), "detached: output");
  for (double& g : got.x) g *= 2;
  check_close(got.x, expected.x, 100, "detached: x");
}

void check_error(ProgramSpec spec, const std::string& message) {
  try {
    make_program(spec);
    fail("no error where expected: " + message);
  } catch (const std::invalid_argument& error) {
    check(error.what() == message, std::string("message: ") + error.what());
  }
}

void check_errors() {
  ProgramSpec spec = mlp("tanh");
  spec.slots[0].shape = {7, 4};
  check_error(spec, "op 0 (linear): weight must have shape [7, 3], got [7, 4]");
  spec = mlp("tanh");
  spec.ops[1].attributes["function"] = std::string("swoosh");
  check_error(spec, "op 1 (activation): function 'swoosh' is not known");
  spec = mlp("tanh");
  spec.ops[2].inputs = {5};
  check_error(spec, "op 2 (linear): input value 5 is not defined by an earlier op");
  spec = mlp("tanh");
  spec.theta_size = 10;
  check_error(spec, "theta_size must be at least 251, the end of the last slot, got 10");
  spec = pooled_convnet();
  spec.ops[0].attributes["stride"] = std::vector<Index>{2, 0};
  check_error(spec, "op 0 (conv2d): stride must be a pair of ints, each at least 1, got [2, 0]");
  spec = pooled_convnet();
  spec.values[1] = {18, 8, 8};
  check_error(spec, "op 0 (conv2d): output must have shape [18, 8, 7], got [18, 8, 8]");
  spec = group_norms();
  spec.ops[1].attributes["groups"] = Index{4};
  check_error(spec, "op 1 (group_norm): groups must divide the number of channels, 6, got 4");
  spec = group_norms();
  spec.ops[1].attributes["channels"] = std::vector<Index>{0, 2};
  check_error(spec, "op 1 (group_norm): channels must be one axis after the other, got [0, 2]");
  spec = skips_and_rearrangements();
  spec.ops[0].kind = "fold";
  check_error(spec, "op 0 (fold): this kind of op is not known");
}

template <typename Add>
ProgramSpec one_op(Add add) {
  ProgramBuilder p({3, 4});
  add(&p);
  return p.spec();
}

void check_shape_errors() {
  ProgramSpec spec = one_op([](ProgramBuilder* p) { p->narrow(0, 1, 3, 2); });
  check_error(spec, "op 0 (narrow): output must be a part of the input [3, 4], got [3, 2] from 3");
  spec.values[1] = {3, 2, 1};
  check_error(spec,
              "op 0 (narrow): output must be a part of the input [3, 4], got [3, 2, 1] from 3");
  spec = one_op([](ProgramBuilder* p) { p->expand(0, {3, 8}); });
  check_error(spec,
              "op 0 (expand): output must repeat axes of length 1 of the input [3, 4], got [3, 8]");
  spec = one_op([](ProgramBuilder* p) { p->cat({0, 0}, 0); });
  spec.values[1] = {7, 4};
  check_error(spec, "op 0 (cat): output must be as long as the inputs together, 6, got [7, 4]");
  spec.values[1] = {6, 5};
  check_error(spec,
              "op 0 (cat): output must be the inputs joined, got [6, 5] where input 0 has shape "
              "[3, 4]");
  spec.ops[0].attributes["dim"] = Index{2};
  check_error(spec, "op 0 (cat): dim must be an axis of an output of shape [6, 5], got 2");
}

}  // namespace

int main() {
  for (const ProgramCase& c : program_cases()) {
    for (int threads : {1, 2, 4}) check_operations(c, threads);
    check_absent_is_zero(c);
    check_shared_theta(c);
  }
  check_in_place(mlp("relu"), mlp("hardtanh"));
  check_in_place(strided_convnet("relu", false, true, true),
                 strided_convnet("hardtanh", false, true, true));
  check_swapped();
  check_detached();
  check_errors();
  check_shape_errors();
  return report("program");
}
