"""Recurrent layers, whose places a program runs one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from doors import check_native
from networks import episodes
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastmaml
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered

PLACES, WIDTH, HIDDEN = 5, 4, 6


class Recurrent(nn.Module):
    """Scores of what ``f(layer, x)`` makes of sequences ``[N, places, width]``."""

    def __init__(self, f: Callable[..., Tensor], layer: nn.Module, out: int = HIDDEN) -> None:
        super().__init__()
        self.f, self.layer, self.head = f, layer, nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self.layer, x))


def _mean(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0].mean(1)


def _in_front(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.transpose(0, 1))[0][-1]


def _both_ends(layer: nn.Module, x: Tensor) -> Tensor:
    h = layer(x)[1]
    return torch.cat([h[-2], h[-1]], 1)


def _cell_state(layer: nn.Module, x: Tensor) -> Tensor:
    y, (h, c) = layer(x)
    return y[:, 0] + c.squeeze(0) * h.transpose(0, 1).flatten(1)


def _from_ones(layer: nn.Module, x: Tensor) -> Tensor:
    start = torch.ones(2, len(x), HIDDEN, dtype=x.dtype)
    return layer(x, start)[0][:, -1]


def _by_cell(layer: nn.Module, x: Tensor) -> Tensor:
    state = None
    for place in range(x.shape[1]):
        state = layer(x[:, place], state)
    return state[0] if isinstance(state, tuple) else state


def _stacked(dim: int) -> Callable[..., Tensor]:
    def states(layer: nn.Module, x: Tensor) -> Tensor:
        state, found = None, []
        for place in range(x.shape[1]):
            state = layer(x[:, place], state)
            found.append(state)
        h = torch.stack(found, dim)
        return h[1] * h.transpose(0, 1)[:, 2] if dim == 0 else h.square().sum(dim)

    return states


def _of(kind: type[nn.Module], *args: object, **kwargs: object) -> Callable[[], nn.Module]:
    return lambda: kind(WIDTH, HIDDEN, *args, **{"batch_first": True, **kwargs})


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module], int]] = {
    "lstm": (_mean, _of(nn.LSTM), HIDDEN),
    "lstm without biases": (_mean, _of(nn.LSTM, bias=False), HIDDEN),
    "gru of two layers": (_both_ends, _of(nn.GRU, 2), 2 * HIDDEN),
    "lstm both ways": (_mean, _of(nn.LSTM, 2, bidirectional=True), 2 * HIDDEN),
    "states of an lstm": (_cell_state, _of(nn.LSTM), HIDDEN),
    "dropout in evaluation": (_mean, lambda: _of(nn.LSTM, 2, dropout=0.5)().eval(), HIDDEN),
    "places in front": (_in_front, _of(nn.LSTM, batch_first=False), HIDDEN),
    "gru": (_mean, _of(nn.GRU), HIDDEN),
    "gru without biases": (_mean, _of(nn.GRU, bias=False), HIDDEN),
    "gru both ways": (_both_ends, _of(nn.GRU, bidirectional=True), 2 * HIDDEN),
    "gru from ones": (_from_ones, _of(nn.GRU, 2), HIDDEN),
    "tanh": (_mean, _of(nn.RNN), HIDDEN),
    "relu": (_mean, _of(nn.RNN, 2, nonlinearity="relu"), HIDDEN),
    "lstm by cell": (_by_cell, lambda: nn.LSTMCell(WIDTH, HIDDEN), HIDDEN),
    "gru by cell": (_by_cell, lambda: nn.GRUCell(WIDTH, HIDDEN, bias=False), HIDDEN),
    "stacked in front": (_stacked(0), lambda: nn.GRUCell(WIDTH, HIDDEN), HIDDEN),
    "stacked": (_stacked(1), lambda: nn.GRUCell(WIDTH, HIDDEN), HIDDEN),
    "stacked behind": (_stacked(-1), lambda: nn.RNNCell(WIDTH, HIDDEN), HIDDEN),
    "tanh by cell": (_by_cell, lambda: nn.RNNCell(WIDTH, HIDDEN), HIDDEN),
}


@pytest.mark.parametrize("name", CASES)
def test_native_recurrent_layers(name: str) -> None:
    torch.manual_seed(1)
    f, layer, out = CASES[name]
    tasks = episodes((PLACES, WIDTH), support=4, query=3)
    check_native(Recurrent(f, layer(), out).double(), tasks, 0.3).adapted(tasks)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_sequences_of_one_place(kind: type[nn.Module]) -> None:
    """No state goes into a product, whose weight has a gradient of zero all the same."""
    torch.manual_seed(1)
    module = Recurrent(_mean, _of(kind)()).double()
    check_native(module, episodes((1, WIDTH)), 0.3)
    assert torch.equal(module.layer.weight_hh_l0.grad, torch.zeros_like(module.layer.weight_hh_l0))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_zeros_that_a_layer_starts_from_do_not_go_in(kind: type[nn.Module]) -> None:
    x = torch.randn(4, PLACES, WIDTH)
    assert capture(Recurrent(_mean, _of(kind)()), x).drawn == 0
    assert capture(Recurrent(_from_ones, _of(nn.GRU, 2)()), x).drawn > 0


def test_a_learned_start() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = _of(nn.GRU)(), nn.Linear(HIDDEN, 3)
            self.start = nn.Parameter(torch.randn(1, 1, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            start = self.start.expand(1, len(x), HIDDEN).contiguous()
            return self.head(self.layer(x, start)[0].mean(1))

    torch.manual_seed(1)
    check_native(Started().double(), episodes((PLACES, WIDTH)), 0.3)


def test_dropout_behind_a_layer_draws_as_pytorch_does() -> None:
    torch.manual_seed(1)
    module = Recurrent(
        lambda layer, x: nn.functional.dropout(layer(x)[0], 0.4).mean(1), _of(nn.LSTM)()
    )
    check_native(module.double(), episodes((PLACES, WIDTH)), 0.3, (1, 3))


def test_a_module_is_as_it_was() -> None:
    """Its list of weights too, which it would make anew for other weights."""
    layer = _of(nn.LSTM)()
    before = {name: list(vars(layer)[name]) for name in ("_flat_weights", "_flat_weight_refs")}
    capture(Recurrent(_mean, layer), torch.randn(4, PLACES, WIDTH))
    assert all(
        a is b
        for name, items in before.items()
        for a, b in zip(vars(layer)[name], items, strict=True)
    )


def _packed(layer: nn.Module, x: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
    return layer(packed)[1][-1]


LEFT_TO_PYTORCH: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module]]] = {
    "projected states": (_mean, _of(nn.LSTM, proj_size=3)),
    "dropout between layers": (_mean, _of(nn.GRU, 2, dropout=0.5)),
    "packed sequences": (_packed, _of(nn.GRU)),
}


@pytest.mark.parametrize("name", LEFT_TO_PYTORCH)
def test_what_is_left_to_pytorch(name: str) -> None:
    f, layer = LEFT_TO_PYTORCH[name]
    module = Recurrent(f, layer(), 3 if name == "projected states" else HIDDEN)
    with pytest.raises(NotCovered):
        capture(module, torch.randn(4, PLACES, WIDTH))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_layer_left_to_pytorch_runs() -> None:
    module = Recurrent(_mean, _of(nn.GRU, 2, dropout=0.5)())
    loss = fastmaml.MAML(module, 0.1).meta_loss(episodes((PLACES, WIDTH), dtype=torch.float32), 1)
    loss.backward()
    assert module.layer.weight_hh_l1.grad.abs().sum() > 0
