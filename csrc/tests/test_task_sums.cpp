// Gradients summed over tasks against the sums of each task's own, with several tasks in a group.
#include "check.h"
#include "program_cases.h"

namespace {

using namespace fastmaml_test;

using Values = std::vector<double>;

constexpr Index kTasks = 37, kExamples = 2;

// Directional derivatives of gradients, at one theta that all tasks share.
class Problem {
 public:
  explicit Problem(const ProgramCase& c)
      : program_(make_program(c.spec)),
        sizes_(program_->sizes()),
        input_size_(element_count(c.spec.values[0])),
        output_size_(element_count(c.spec.values[c.spec.output])),
        theta_(random_values<double>(sizes_.theta, 0.5)),
        direction_(random_values<double>(kTasks * sizes_.theta)),
        phi_(random_values<double>(sizes_.shared)),
        buffers_(random_values<double>(sizes_.buffers)),
        x_(random_values<double>(kTasks * kExamples * input_size_)),
        gy_(random_values<double>(kTasks * kExamples * output_size_)),
        dgy_(random_values<double>(kTasks * kExamples * output_size_)) {
    for (double& value : buffers_) value = 0.5 + std::fabs(value);
  }

  Index theta_size() const { return sizes_.theta; }

  Values second(bool packed, bool sum, int threads, Values* dgphi) const {
    const Values theta = packed ? pack(theta_, 1) : theta_;
    const Values direction = packed ? pack(direction_, kTasks) : direction_;
    const Index row = packed ? sizes_.packed_theta : sizes_.theta;
    Values y = poisoned<double>(kTasks * kExamples * output_size_), dy = y;
    fastmaml::ForwardArgs forward;
    forward.theta = theta.data();
    forward.shared = phi_.data();
    forward.buffers = buffers_.data();
    forward.x = x_.data();
    forward.tasks = kTasks;
    forward.examples = kExamples;
    forward.y = y.data();
    forward.threads = threads;
    forward.packed = packed;
    const auto context = program_->forward(forward);
    Values gtheta = poisoned<double>(kTasks * row), gphi = poisoned<double>(sizes_.shared);
    void* shared = sizes_.shared > 0 ? gphi.data() : nullptr;
    const auto gradient =
        program_->backward(*context, {gy_.data(), gtheta.data(), shared, nullptr, threads, true});
    const auto tangent = program_->tangent(
        *context, {direction.data(), row, nullptr, nullptr, dy.data(), threads, true});
    Values out = poisoned<double>((sum ? 1 : kTasks) * row);
    program_->backward_tangent(*context, *gradient, *tangent,
                               {dgy_.data(), out.data(), shared, nullptr, threads, sum});
    *dgphi = gphi;
    return packed ? unpack(out, sum ? 1 : kTasks) : out;
  }

 private:
  Values pack(const Values& theta, Index rows) const {
    Values packed = poisoned<double>(rows * sizes_.packed_theta);
    program_->pack_theta(theta.data(), rows, packed.data(), 1);
    return packed;
  }
  Values unpack(const Values& packed, Index rows) const {
    Values theta = poisoned<double>(rows * sizes_.theta);
    program_->unpack_theta(packed.data(), rows, theta.data(), 1);
    return theta;
  }

  std::shared_ptr<fastmaml::Program> program_;
  fastmaml::ProgramSizes sizes_;
  Index input_size_, output_size_;
  Values theta_, direction_, phi_, buffers_, x_, gy_, dgy_;
};

void check_sums(const ProgramCase& c) {
  const Problem problem(c);
  const Index size = problem.theta_size();
  Values phi;
  const Values rows = problem.second(false, false, 1, &phi);
  Values expected(static_cast<std::size_t>(size), 0);
  for (Index i = 0; i < kTasks * size; ++i) expected[i % size] += rows[i];
  for (const bool packed : {false, true}) {
    const std::string name = c.name + (packed ? ", packed" : "");
    Values got_phi, again_phi;
    const Values got = problem.second(packed, true, 1, &got_phi);
    check_close(got, expected, 1000, name + ": theta");
    check_close(got_phi, phi, 1000, name + ": phi", 1);
    for (const int threads : {2, 5}) {
      const Values again = problem.second(packed, true, threads, &again_phi);
      check(again == got && again_phi == got_phi, name + ": threads change the sums");
    }
  }
}

void check_step() {
  constexpr Index kSize = 5003;
  const Values cotangent = random_values<double>(kTasks * kSize);
  for (const int threads : {1, 3}) {
    Values dgradient = poisoned<double>(kTasks * kSize), sum = poisoned<double>(kSize);
    Values scaled(cotangent), total(static_cast<std::size_t>(kSize), 0);
    for (double& value : scaled) value *= -0.25;
    for (Index i = 0; i < kTasks * kSize; ++i) total[i % kSize] += cotangent[i];
    fastmaml::StepAdjointArgs args{fastmaml::DType::kFloat64, cotangent.data(), kTasks, kSize, 0.25,
                                   dgradient.data(),          sum.data(),       threads};
    step_adjoint(args);
    check(dgradient == scaled, "step: the gradient's cotangent");
    check(sum == total, "step: the sum over tasks");
    args.dgradient = nullptr;
    sum = poisoned<double>(kSize);
    args.sum = sum.data();
    step_adjoint(args);
    check(sum == total, "step: the sum alone");
  }
}

}  // namespace

int main() {
  for (const ProgramCase& c : program_cases()) check_sums(c);
  check_step();
  return report("task_sums");
}
