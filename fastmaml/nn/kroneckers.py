"""Linear maps on n x m matrices as Kronecker products, and recurrent cells made of them.

Jose et al., "Kronecker recurrent units", ICML 2018; Arnold et al., "When MAML can adapt fast and
how to assist when it cannot", AISTATS 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kronecker_addmm(
    mat1: Tensor,
    mat2: Tensor,
    mat3: Tensor,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """``alpha * mat1 @ mat3 @ mat2 + beta * bias``: mat2' x mat1 applied to the vector of mat3."""
    product = alpha * (mat1 @ mat3 @ mat2)
    return product if bias is None else product + beta * bias


class KroneckerLinear(nn.Module):
    """``L X R + B`` for X ``[..., n, m]``, or of a vector ``[n * m]`` whose columns are X's.

    Starts as the identity. It has n^2 + m^2 weights where a full linear map has n^2 m^2.

    Args:
        bias: add B ``[n, m]``, which starts from zero.
        psd: use L'L and R'R, which are positive semi-definite.

    Raises:
        ValueError: the input has another size.
    """

    def __init__(
        self,
        n: int,
        m: int,
        bias: bool = True,
        psd: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.eye(n, device=device))
        self.right = nn.Parameter(torch.eye(m, device=device))
        self.bias = nn.Parameter(torch.zeros(n, m, device=device)) if bias else None
        self.psd = psd

    def forward(self, x: Tensor) -> Tensor:
        left = self.left.T @ self.left if self.psd else self.left
        right = self.right.T @ self.right if self.psd else self.right
        n, m = len(left), len(right)
        if x.shape == (n * m,):
            return kronecker_addmm(left, right, x.view(m, n).T, self.bias).T.flatten()
        if x.shape[-2:] != (n, m):
            raise ValueError(f"x must have shape [{n * m}] or [..., {n}, {m}], got {list(x.shape)}")
        return kronecker_addmm(left, right, x, self.bias)


class KroneckerRNN(nn.Module):
    """A recurrent cell: ``(x, hidden)`` to ``(output, hidden)``, shapes as in `KroneckerLinear`.

    Args:
        sigma: the nonlinearity; None: tanh.
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma: nn.Module | None = None) -> None:
        super().__init__()
        self.W_h = KroneckerLinear(n, m, bias)
        self.U_h = KroneckerLinear(n, m, bias)
        self.W_y = KroneckerLinear(n, m, bias)
        self.sigma = nn.Tanh() if sigma is None else sigma

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.sigma(self.W_h(x) + self.U_h(hidden))
        return self.W_y(hidden), hidden


class KroneckerLSTM(nn.Module):
    """An LSTM cell: ``(x, (h, c))`` to ``(h, (h, c))``, shapes as in `KroneckerLinear`.

    Args:
        sigma: the gates' nonlinearity; None: the logistic function.
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma: nn.Module | None = None) -> None:
        super().__init__()
        for gate in "ifgo":
            setattr(self, f"W_i{gate}", KroneckerLinear(n, m, bias))
            setattr(self, f"W_h{gate}", KroneckerLinear(n, m, bias))
        self.sigma = nn.Sigmoid() if sigma is None else sigma
        self.tanh = nn.Tanh()

    def forward(
        self, x: Tensor, hidden: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = hidden
        i, f, o = (self.sigma(self._gate(gate, x, h)) for gate in "ifo")
        c = f * c + i * self.tanh(self._gate("g", x, h))
        h = o * self.tanh(c)
        return h, (h, c)

    def _gate(self, gate: str, x: Tensor, h: Tensor) -> Tensor:
        return getattr(self, f"W_i{gate}")(x) + getattr(self, f"W_h{gate}")(h)
