"""iMAML: "Meta-learning with implicit gradients" (Rajeswaran et al., NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml import checks
from fastmaml.chunks import in_chunks
from fastmaml.compilation import left_alone
from fastmaml.data.episodes import EpisodeSampler, next_batch
from fastmaml.data.task_batch import TaskBatch
from fastmaml.fused_call import FusedRates
from fastmaml.learner import Learner
from fastmaml.losses import TaskLoss, per_task
from fastmaml.maml import MAML
from fastmaml.program.autograd import GivenGradients
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.theta import Theta


class IMAML(MAML):
    """MAML with a proximal inner loop, whose meta-gradient does not depend on its path.

    The inner loop minimises L_S(theta) + strength / 2 |theta - theta_0|^2. At its end the
    meta-gradient is the solution x of (I + H / strength) x = grad L_Q, with H the Hessian of L_S
    there, found by conjugate gradients on the engine's Hessian-vector products. Memory does not
    grow with the steps. The gradient is exact where the inner loop has converged and the conjugate
    gradients too.

    Only :meth:`meta_loss` computes the implicit gradient. ``clone()`` and ``adapt()`` take the same
    inner steps, but the gradient through them is of first order; use them for evaluation only.

    Args:
        module: any ``nn.Module``.
        lr: the inner learning rate.
        strength: of the proximal term; H / strength should be well above -1.
        cg_steps: conjugate gradient iterations.

    Raises:
        TypeError, ValueError: see :class:`fastmaml.MAML`; ``strength`` is not above 0.
    """

    def __init__(
        self, module: nn.Module, lr: float, strength: float = 2.0, cg_steps: int = 5
    ) -> None:
        super().__init__(module, lr, first_order=True)
        if not strength > 0:
            raise ValueError(f"strength must be above 0, got {strength}")
        self.strength = strength
        self.cg_steps = cg_steps

    def update(self, learner: Learner, theta: Theta, gradient: Tensor) -> Tensor:
        """A gradient step on the loss and the proximal term."""
        with torch.no_grad():
            start = self.layout().pack(adapted=True)[None]
        away = theta.root - (start if theta.packing is None else theta.packing.pack(start))
        return theta.root - learner.lr * (gradient + self.strength * away)

    def fused_rates(self, layout: ParameterLayout, theta: Tensor, steps: int) -> FusedRates | None:
        """None: the inner step has the proximal term."""
        return None

    @left_alone
    def meta_loss(
        self,
        batch: TaskBatch | EpisodeSampler,
        steps: int = 1,
        loss: TaskLoss = F.cross_entropy,
        first_order: bool | None = None,
        *,
        chunk: int | None = None,
    ) -> Tensor:
        """The mean query loss after ``steps`` inner steps, with the implicit gradient.

        Args:
            batch, steps, loss, chunk: see :meth:`fastmaml.MAML.meta_loss`.
            first_order: True: without the Hessian, which is FOMAML's gradient.

        Raises:
            ValueError, TypeError, FloatingPointError: see :meth:`fastmaml.MAML.meta_loss`; the
                support set is in mini-batches.
        """
        if chunk is not None:
            part_loss = partial(self.meta_loss, steps=steps, loss=loss, first_order=first_order)
            return in_chunks(self, batch, chunk, part_loss)
        checks.steps_count(steps)
        batch = next_batch(batch, self.layout())
        if batch.minibatches is not None:
            raise ValueError(
                "support_x must be [T, N, ...] for IMAML, whose gradient is that at the optimum of "
                f"the whole support loss; got {list(batch.support_x.shape)}"
            )
        learner = self.clone(tasks=batch.tasks, first_order=True, allow_unused=True)
        for _ in range(steps):
            _restart(learner)
            learner.adapt(per_task(loss, learner(batch.support_x), batch.support_y))
        root = _restart(learner)
        losses = per_task(loss, learner(batch.query_x), batch.query_y)
        checks.finite_loss(losses)
        (outer,) = torch.autograd.grad(losses.sum(), root)
        if not first_order:
            outer = self._solve(learner, root, batch, loss, outer)
        learner.set_theta(outer)
        gradients: list[Tensor | None] = list(learner.layout.unpack(learner.theta.mean(0), None))
        result: Tensor = GivenGradients.apply(
            losses.detach().mean(), gradients, *learner.layout.parameters
        )
        return result

    def _solve(
        self, learner: Learner, root: Tensor, batch: TaskBatch, loss: TaskLoss, target: Tensor
    ) -> Tensor:
        inner = per_task(loss, learner(batch.support_x), batch.support_y).sum()
        (gradient,) = torch.autograd.grad(inner, root, create_graph=True)

        def curved(v: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(gradient, root, v, retain_graph=True)
            return v + product / self.strength

        return conjugate_gradients(curved, target, self.cg_steps)


def _restart(learner: Learner) -> Tensor:
    """The learner's parameters as a leaf: no graph leads back from here."""
    root = learner.theta.detach().requires_grad_()
    learner.set_theta(root)
    return root


def conjugate_gradients(apply: Callable[[Tensor], Tensor], target: Tensor, steps: int) -> Tensor:
    """``x`` with ``apply(x) = target`` for each row, by so many steps of the method.

    Args:
        apply: a symmetric positive definite map of ``[T, P]``, row by row.
        target: ``[T, P]``.
    """
    x = torch.zeros_like(target)
    residual, direction = target, target
    norm = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = apply(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(norm > 0, norm / curvature, torch.zeros_like(norm))
        x = x + length * direction
        residual = residual - length * image
        previous, norm = norm, residual.square().sum(1, keepdim=True)
        ratio = torch.where(previous > 0, norm / previous, torch.zeros_like(norm))
        direction = residual + ratio * direction
    return x
