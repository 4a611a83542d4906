"""Door 3: a whole meta-step in one call, and adaptation without a graph for evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmaml import checks
from fastmaml.backends.select import forced_backend
from fastmaml.data.episodes import EpisodeSampler
from fastmaml.data.task_batch import TaskBatch
from fastmaml.errors import UnbatchableError
from fastmaml.fused_call import Runner, runner
from fastmaml.learner import Learner
from fastmaml.losses import TaskLoss, built_in, per_task
from fastmaml.program.autograd import fused_meta_loss
from fastmaml.program.capture import FAILS_ON_A_SAMPLE

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
    batch, found = _recognised(maml, layout, theta, source, loss)
    checks.minibatch_steps(batch, steps)
    inner = maml.fused_rates(layout, theta, steps)
    found = None if found is None else found.with_inner(inner)
    apart = found is None or not found.takes_as_it_is or maml.starts_apart
    if sampler is not None and episodes is not None and apart:
        # drawn now: what is read before the meta-step, or saved for a graph, is to stay
        batch, episodes = sampler.sample(), None
    if found is None or inner is None:
        return _by_autograd(maml, batch, steps, loss, order)
    start = maml.fused_start(layout, batch)
    theta = theta if start is None else start.detach()
    call = found.call(batch, steps, loss, theta, phi, inner, order)
    if call is None:
        return _by_autograd(maml, batch, steps, loss, order)
    call.episodes = episodes
    call.memory_budget = checks.memory_budget(maml.memory_budget)
    if torch.is_grad_enabled():
        call.rates_gradient = call.rates is not None and call.rates.requires_grad
        if call.update is not None:
            call.coefficients_gradient = [c.requires_grad for c in call.update.coefficients]
        learned = call.rates_gradient or any(call.coefficients_gradient)
        call.gradient = layout.requires_grad or learned
        call.shared_gradient = layout.shared_requires_grad
    (value, result), found = found.run(
        call, loss, lambda executor, call: fused_meta_loss(executor, layout, call, start)
    )
    if (terms := found.terms(batch.query_x.shape[1])) != 1:
        value = value * terms
    checks.finite_loss(value)
    if result.statistics is not None:
        found.program.running.fold(result.statistics)
    return value


class Recognised(NamedTuple):
    """A batch's form that has passed the checks, and what runs batches of that form."""

    form: tuple[object, ...]
    runner: Runner | None


def _recognised(
    maml: MAML, layout: ParameterLayout, theta: Tensor, batch: TaskBatch, loss: TaskLoss
) -> tuple[TaskBatch, Runner | None]:
    """``batch`` checked, and what takes it in one call, or None.

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
        found = None if data_learned else runner(program, batch, own_loss)
        maml.recognised = known = Recognised(form, found)
    return TaskBatch(*batch), known.runner


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
    program = maml.current_program(layout, batch.support(0)[0])
    inner = maml.fused_rates(layout, theta, steps)
    found = runner(program, batch, built_in(loss))
    found = None if found is None else found.with_inner(inner)
    if found is not None and inner is not None:
        start = maml.fused_start(layout, batch)
        theta = theta if start is None else start
        call = found.call(TaskBatch._make((*batch[:3], None)), steps, loss, theta, phi, inner)
        if call is not None:
            result, _ = found.run(call, loss, lambda executor, call: executor.meta_step(call))
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
