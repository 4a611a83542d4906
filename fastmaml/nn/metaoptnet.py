"""The differentiable support-vector classifier of MetaOptNet (Lee et al., CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmaml.nn.protonet import EPSILON, PrototypicalClassifier

_TO_BOUNDARY = 0.99  # of the way to where a slack or a multiplier would vanish


class SVClassifier(nn.Module):
    """A multi-class linear SVM (Crammer & Singer, 2001), differentiable in its support set.

    Its dual, a quadratic program, is solved by an interior-point method; gradients are those of
    the optimum (Amos & Kolter, "OptNet", ICML 2017), by the linear system of its active set.

    Args:
        support: embeddings ``[N, D]``; with ``labels`` they are fitted at once.
        labels: ``[N]``, from 0.
        ways: number of classes; None: as many as ``labels`` has.
        normalize: scale embeddings to length one.
        C_reg: bound on the dual variables.
        max_iters: iterations of the interior-point method.
    """

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        ways: int | None = None,
        normalize: bool = False,
        C_reg: float = 0.1,
        max_iters: int = 15,
    ) -> None:
        super().__init__()
        self.C_reg = C_reg
        self.max_iters = max_iters
        self._normalises = normalize
        self.support: Tensor | None = None
        self.dual: Tensor | None = None  # [N, ways]
        if support is not None and labels is not None:
            self.fit_(support, labels, ways)

    def fit_(
        self,
        support: Tensor,
        labels: Tensor,
        ways: int | None = None,
        C_reg: float | None = None,
        max_iters: int | None = None,
    ) -> None:
        """Solve for the support set; see the class."""
        support = self.normalize(support) if self._normalises else support
        ways = len(labels.unique()) if ways is None else ways
        wanted = F.one_hot(labels.long(), ways).to(support).flatten()
        kernel = support @ support.T
        quadratic = torch.kron(kernel, torch.eye(ways).to(kernel))
        quadratic = quadratic + torch.eye(len(quadratic)).to(kernel)
        balanced = torch.kron(torch.eye(len(support)), torch.ones(1, ways)).to(kernel)
        bound = (self.C_reg if C_reg is None else C_reg) * wanted
        iterations = self.max_iters if max_iters is None else max_iters
        self.dual = solve_bounded(quadratic, -wanted, bound, balanced, iterations).view(-1, ways)
        self.support = support

    @staticmethod
    def normalize(x: Tensor, epsilon: float = EPSILON) -> Tensor:
        """Rows of length one."""
        return PrototypicalClassifier.normalize(x, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Queries ``[M, D]`` to scores ``[M, ways]``.

        Raises:
            RuntimeError: nothing has been fitted.
        """
        if self.support is None or self.dual is None:
            raise RuntimeError("there is no classifier yet; call fit_(support, labels) first")
        x = self.normalize(x) if self._normalises else x
        return x @ self.support.T @ self.dual


def solve_bounded(
    quadratic: Tensor, linear: Tensor, bound: Tensor, constraint: Tensor, iterations: int
) -> Tensor:
    """``argmin z'Qz / 2 + p'z`` with ``z <= h`` and ``A z = 0``; differentiable in Q, p and h.

    Args:
        quadratic: Q ``[n, n]``, positive definite.
        linear: p ``[n]``.
        bound: h ``[n]``.
        constraint: A ``[m, n]`` of full rank.
    """
    with torch.no_grad():
        q, p, h, a = (t.double() for t in (quadratic, linear, bound, constraint))
        active = _active_set(q, p, h, a, iterations)
    # At the optimum the active bounds are equalities. They may depend on each other and on A: the
    # solution of least norm then has the same z.
    rows = torch.cat([constraint, torch.eye(len(linear)).to(quadratic)[active]])
    corner = quadratic.new_zeros(len(rows), len(rows))
    system = torch.cat([torch.cat([quadratic, rows.T], 1), torch.cat([rows, corner], 1)])
    target = torch.cat([-linear, linear.new_zeros(len(constraint)), bound[active]])
    return (torch.linalg.pinv(system, hermitian=True) @ target)[: len(linear)]


def _active_set(
    quadratic: Tensor, linear: Tensor, bound: Tensor, constraint: Tensor, iterations: int
) -> Tensor:
    """Which bounds hold with equality at the optimum, by a primal-dual interior-point method."""
    n, m = len(linear), len(constraint)
    z, nu = linear.new_zeros(n), linear.new_zeros(m)
    slack, multiplier = linear.new_ones(n), linear.new_ones(n)
    for _ in range(iterations):
        centre = 0.1 * (slack @ multiplier) / n
        dual = quadratic @ z + linear + multiplier + constraint.T @ nu
        primal = z + slack - bound
        shift = (centre - slack * multiplier + multiplier * primal) / slack
        top = torch.cat([quadratic + torch.diag(multiplier / slack), constraint.T], 1)
        bottom = torch.cat([constraint, constraint.new_zeros(m, m)], 1)
        step = torch.linalg.solve(
            torch.cat([top, bottom]), -torch.cat([dual + shift, constraint @ z])
        )
        dz = step[:n]
        dslack = -primal - dz
        dmultiplier = (centre - slack * multiplier - multiplier * dslack) / slack
        length = min(_longest(slack, dslack), _longest(multiplier, dmultiplier))
        z, nu = z + length * dz, nu + length * step[n:]
        slack, multiplier = slack + length * dslack, multiplier + length * dmultiplier
    return multiplier > slack


def _longest(value: Tensor, change: Tensor) -> float:
    """The longest step, at most one, that keeps ``value`` positive."""
    falling = change < 0
    if not bool(falling.any()):
        return 1.0
    return min(1.0, _TO_BOUNDARY * float((-value[falling] / change[falling]).min()))
