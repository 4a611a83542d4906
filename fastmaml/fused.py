"""Door 3: a whole meta-step in one call, and adaptation without a graph for evaluation."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastmaml import checks
from fastmaml.backends.base import MetaStep
from fastmaml.backends.select import forced_backend
from fastmaml.data.episodes import EpisodeSampler
from fastmaml.data.task_batch import TaskBatch
from fastmaml.errors import UnbatchableError
from fastmaml.learner import Learner
from fastmaml.losses import IGNORED_LABEL, BuiltIn, TaskLoss, built_in, per_task
from fastmaml.program.autograd import fused_meta_loss
from fastmaml.program.capture import FAILS_ON_A_SAMPLE
from fastmaml.program.program import NativeProgram, Program
from fastmaml.program.updates import FusedUpdate

if TYPE_CHECKING:
    from fastmaml.maml import MAML
    from fastmaml.program.layout import ParameterLayout


def meta_loss(
    maml: MAML,
    source: TaskBatch | EpisodeSampler,
    steps: int,
    loss: TaskLoss,
    first_order: bool | None,
) -> Tensor:
    """See :meth:`fastmaml.MAML.meta_loss`; of a sampler the next batch."""
    order = maml.first_order if first_order is None else first_order
    checks.steps_count(steps)
    with torch.no_grad():
        layout, theta, phi = maml.packed()
    sampler, episodes = None, None
    if isinstance(source, EpisodeSampler):
        sampler, (source, episodes) = source, source.in_place()
    batch, program, known = _recognised(maml, layout, theta, source, loss)
    checks.minibatch_steps(batch, steps)
    rates = _inner_steps(maml, layout, theta, steps, known)
    apart = program is None or rates is None or not program.takes_as_it_is or maml.starts_apart
    if sampler is not None and episodes is not None and apart:
        # drawn now: what is read before the meta-step, or saved for a graph, is to stay
        batch, episodes = sampler.sample(), None
    if program is None or rates is None or known is None:
        return _by_autograd(maml, batch, steps, loss, order)
    start = maml.fused_start(layout, batch)
    theta = theta if start is None else start.detach()
    call = _call(program, batch, steps, known, theta, phi, rates, order)
    call.episodes = episodes
    call.memory_budget = checks.memory_budget(maml.memory_budget)
    if torch.is_grad_enabled():
        call.rates_gradient = call.rates is not None and call.rates.requires_grad
        if call.update is not None:
            call.coefficients_gradient = [c.requires_grad for c in call.update.coefficients]
        learned = call.rates_gradient or any(call.coefficients_gradient)
        call.gradient = layout.requires_grad or learned
        call.shared_gradient = layout.shared_requires_grad
    try:
        value, result = fused_meta_loss(program.executor, layout, call, start)
    except ValueError:
        if not _leaves_labels_out(program, call):
            raise
        return _by_autograd(maml, batch, steps, loss, order)
    if known.summed:
        value = value * _terms(program, known, batch.query_x)
    checks.finite_loss(value)
    if result.statistics is not None:
        program.running.fold(result.statistics)
    return value


def _inner_steps(
    maml: MAML, layout: ParameterLayout, theta: Tensor, steps: int, known: BuiltIn | None
) -> FusedRates | FusedUpdate | None:
    """See :meth:`fastmaml.MAML.fused_rates`. The loss is a mean there: of a sum's gradients, which
    are multiples of its own, plain steps alone are steps of another size.
    """
    inner = maml.fused_rates(layout, theta, steps)
    resized = known is None or not known.summed or not isinstance(inner, FusedUpdate)
    return inner if resized else None


def _terms(program: NativeProgram, known: BuiltIn, x: Tensor) -> int:
    """Of the sum that the loss of one task's examples ``x [T, N, ...]`` is the mean of."""
    return x.shape[1] * (prod(program.output_shape) if known.kind == "mse" else 1)


Labels = TypeVar("Labels", Tensor, Tensor | None)
FusedRates = tuple[float, Tensor | None]  # a factor, and factors [P] or [steps, P] on it


class Recognised(NamedTuple):
    """A batch's form that has passed the checks, and what runs batches of that form."""

    form: tuple[object, ...]
    program: NativeProgram | None


def _recognised(
    maml: MAML, layout: ParameterLayout, theta: Tensor, batch: TaskBatch, loss: TaskLoss
) -> tuple[TaskBatch, NativeProgram | None, BuiltIn | None]:
    """``batch`` checked, the native program for it, or None, and what its loss is.

    A form that has passed once is known again at the price of a comparison.
    """
    own_loss = built_in(loss)
    attributes = None if maml.signature is None else maml.signature.attributes
    state = (layout, attributes, theta.dtype, theta.device, own_loss, forced_backend())
    form = (*state, *checks.form(batch))
    known = maml.recognised
    if known is None or known.form != form:
        batch = checks.batch(batch, theta, labels_needed=True, several_dtypes=layout.several_dtypes)
        program = maml.current_program(layout, batch.support(0)[0])
        data_learned = any(t.requires_grad for t in batch)
        native = None if data_learned else _native(program, batch, own_loss)
        maml.recognised = known = Recognised(form, native)
    return TaskBatch(*batch), known.program, own_loss


def _by_autograd(
    maml: MAML, batch: TaskBatch, steps: int, loss: TaskLoss, first_order: bool
) -> Tensor:
    """Door 2 written out: any loss, any module."""
    learner = maml.learner_for(batch, first_order)
    for step in range(steps):
        x, y = batch.support(step)
        learner.adapt(_losses(maml, learner, "support", x, y, loss))
    value = _losses(maml, learner, "query", batch.query_x, batch.query_y, loss).mean()
    checks.finite_loss(value)
    return value


def _losses(
    maml: MAML, learner: Learner, part: str, x: Tensor, y: Tensor, loss: TaskLoss
) -> Tensor:
    """The losses ``[T]`` of a support or query set."""
    outputs = _outputs(maml, learner, f"{part}_x", x)
    known = built_in(loss)
    if known is not None and known.kind == "cross_entropy":
        checks.class_targets(f"{part}_y", y, outputs)
    return per_task(loss, outputs, y)


def _outputs(maml: MAML, learner: Learner, name: str, x: Tensor) -> Tensor:
    """``learner(x)``, with an error that names examples which are not the model's."""
    try:
        outputs = learner(x)
    except UnbatchableError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = getattr(maml.current_program(learner.layout, x), "reason", "")
        if x.is_floating_point() and not reason.startswith(FAILS_ON_A_SAMPLE):
            raise
        raise ValueError(
            f"{name} must be tasks of examples [T, N, ...] that the model takes, "
            f"got {list(x.shape)} of {x.dtype}: {error}"
        ) from error
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"model must return a tensor, got {type(outputs).__name__}; wrap it in a module that "
            "does, or write the inner loop with clone() and adapt()"
        )
    return outputs


def _call(
    program: NativeProgram,
    batch: TaskBatch,
    steps: int,
    known: BuiltIn,
    theta: Tensor,
    phi: Tensor,
    inner: FusedRates | FusedUpdate,
    first_order: bool = False,
) -> MetaStep:
    """The meta-step as it stands, without a gradient: of the mean, where the loss is a sum.

    The cross-entropy of log-probabilities is their negative log-likelihood, with all derivatives.
    """
    update = inner if isinstance(inner, FusedUpdate) else None
    rate, rates = (0.0, None) if isinstance(inner, FusedUpdate) else inner
    if known.summed:
        rate *= _terms(program, known, batch.support(0)[0])
    if program.takes_whole_numbers:
        x = [program.converted(f"{part}_x", batch[i]) for part, i in (("support", 0), ("query", 2))]
        batch = TaskBatch(x[0], batch.support_y, x[1], batch.query_y)
    if program.graph.drawn:
        batch = _with_draws(program, batch, steps)
    return MetaStep(
        theta=theta,
        phi=phi,
        buffers=program.buffers(),
        support_x=batch.support_x,
        support_y=_labels(batch.support_y),
        query_x=batch.query_x,
        query_y=_labels(batch.query_y),
        minibatches=batch.minibatches is not None,
        steps=steps,
        loss="mse" if known.kind == "mse" else "cross_entropy",
        rate=rate,
        rates=rates,
        update=update,
        first_order=first_order,
        gradient=False,
    )


def _with_draws(program: NativeProgram, batch: TaskBatch, steps: int) -> TaskBatch:
    """``batch`` with what forward draws, task by task, as a loop over tasks would."""
    supports = [batch.support(step) for step in range(max(steps, 1))]
    support_x = torch.stack([program.with_room(x) for x, _ in supports])
    query_x = program.with_room(batch.query_x)
    for task in range(batch.tasks):
        for step in range(steps):
            program.draw(support_x[step, task])
        program.draw(query_x[task])
    return TaskBatch(support_x, torch.stack([y for _, y in supports]), query_x, batch.query_y)


def _labels(y: Labels) -> Labels:
    return y.long() if y is not None and y.dtype is torch.uint8 else y


def _leaves_labels_out(program: NativeProgram, call: MetaStep) -> bool:
    """Whether labels were refused that cross-entropy leaves out: there are no kernels for that."""
    targets = [y for y in (call.support_y, call.query_y) if y is not None]
    if call.loss != "cross_entropy" or not all(y.is_cpu for y in targets):
        return False
    classes = program.output_shape[0]
    return checks.some_left_out(IGNORED_LABEL, targets, classes)


def _native(program: Program, batch: TaskBatch, known: BuiltIn | None) -> NativeProgram | None:
    """``program`` where it can take a meta-step of this (checked) batch and loss.

    There are no kernels for class probabilities as targets, nor for a cross-entropy of pixels.
    """
    if not isinstance(program, NativeProgram) or known is None:
        return None
    output = program.output_shape
    if known.kind != "mse":
        targets = [y for y in (batch.support(0)[1], batch.query_y) if y is not None]
        if len(output) > 1 or any(y.is_floating_point() for y in targets):
            return None
        if known.kind == "nll" and not program.gives_log_probabilities:
            return None
    if any(program.why_not(x.shape[1]) for x in (batch.support(0)[0], batch.query_x)):
        return None
    for part, (x, y) in (("support", batch.support(0)), ("query", batch[2:])):
        program.check_examples(x.shape[1], f"{part}_x")
        if y is not None:
            checks.known_loss_targets(known.kind, f"{part}_y", y, output, program.dtype)
    return program


class Adapted:
    """Parameters adapted to T tasks, and their predictions; nothing here carries a graph."""

    def __init__(self, learner: Learner, batch: TaskBatch, predictions: Tensor | None) -> None:
        self._learner = learner
        self._batch = batch
        self._predictions = predictions

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, ``[T, *shape]``."""
        return {name: p.detach() for name, p in self._learner.adapted_parameters().items()}

    @torch.no_grad()
    def predict(self, x: Tensor | None = None) -> Tensor:
        """The outputs ``[T, N, ...]`` for ``x [T, N, ...]``, by default the batch's query set."""
        if x is not None:
            output: Tensor = self._learner(x)
            return output
        if self._predictions is None:
            self._predictions = self._learner(self._batch.query_x)
        return self._predictions


@torch.inference_mode(False)  # in which nothing has a gradient, the inner loop neither
@torch.no_grad()
def adapted(maml: MAML, batch: TaskBatch, steps: int, loss: TaskLoss) -> Adapted:
    """See :meth:`fastmaml.MAML.adapted`."""
    checks.steps_count(steps)
    layout, theta, phi = maml.packed()
    several = layout.several_dtypes
    checked = checks.batch(batch, theta, labels_needed=False, several_dtypes=several)
    batch = TaskBatch._make(map(_ordinary, checked))
    checks.minibatch_steps(batch, steps)
    learner = maml.learner_for(batch, first_order=True)
    learner.updates_statistics = False
    known = built_in(loss)
    program = _native(maml.current_program(layout, batch.support(0)[0]), batch, known)
    rates = _inner_steps(maml, layout, theta, steps, known)
    if program is not None and rates is not None and known is not None:
        start = maml.fused_start(layout, batch)
        theta = theta if start is None else start
        call = _call(program, batch, steps, known, theta, phi, rates)
        call.query_y = None
        try:
            result = program.executor.meta_step(call)
        except ValueError:
            if not _leaves_labels_out(program, call):
                raise
        else:
            assert result.adapted is not None  # it comes with every call without a gradient
            learner.set_theta(result.adapted)
            return Adapted(learner, batch, result.predictions)
    for step in range(steps):
        x, y = batch.support(step)
        with torch.enable_grad():
            learner.set_theta(learner.theta.detach().requires_grad_())
            learner.adapt(_losses(maml, learner, "support", x, y, loss))
        learner.detach_parameters()
    return Adapted(learner, batch, None)


def _ordinary(tensor: Tensor | None) -> Tensor | None:
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor
