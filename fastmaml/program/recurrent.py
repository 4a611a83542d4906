"""PyTorch's recurrent layers with the examples in front, place by place, as programs have them.

PyTorch runs a layer as one call, with places in front. What this computes is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

States = Sequence[Tensor | None]  # h, of an LSTM also c, each [N, H]; None is zero
Step = Callable[[Tensor, Tensor | None, States], tuple[Tensor, ...]]
IsZero = Callable[[Tensor], bool]


def _long_short_term_memory(
    given: Tensor, kept: Tensor | None, states: States
) -> tuple[Tensor, ...]:
    """Of the input's and the state's products with the weights; the next states."""
    i, f, g, o = (given if kept is None else given + kept).chunk(4, 1)
    c = torch.sigmoid(i) * torch.tanh(g)
    if states[1] is not None:
        c = torch.sigmoid(f) * states[1] + c
    return torch.sigmoid(o) * torch.tanh(c), c


def _gated_unit(given: Tensor, kept: Tensor | None, states: States) -> tuple[Tensor, ...]:
    r, z, n = given.chunk(3, 1)
    h = states[0]
    if kept is None:
        n = torch.tanh(n)
        return (n - torch.sigmoid(z) * n,)
    own_r, own_z, own_n = kept.chunk(3, 1)
    n = torch.tanh(n + torch.sigmoid(r + own_r) * own_n)
    z = torch.sigmoid(z + own_z)
    return (n - z * n if h is None else n + z * (h - n),)


def _simple(function: Callable[[Tensor], Tensor]) -> Step:
    def step(given: Tensor, kept: Tensor | None, states: States) -> tuple[Tensor, ...]:
        return (function(given if kept is None else given + kept),)

    return step


LAYERS: dict[Any, Step] = {
    torch.lstm: _long_short_term_memory,
    torch.gru: _gated_unit,
    torch.rnn_tanh: _simple(torch.tanh),
    torch.rnn_relu: _simple(torch.relu),
}
CELLS: dict[Any, Step] = {
    torch.lstm_cell: _long_short_term_memory,
    torch.gru_cell: _gated_unit,
    torch.rnn_tanh_cell: _simple(torch.tanh),
    torch.rnn_relu_cell: _simple(torch.relu),
}


def cell(step: Step, args: Sequence[Any]) -> tuple[Tensor, ...] | Tensor:
    """What a call of one step gives."""
    x, states, of_input, of_state, *biases = args
    input_bias, state_bias = biases or (None, None)
    several = isinstance(states, (list, tuple))
    states = states if several else (states,)
    given = F.linear(x, of_input, input_bias)
    ends = step(given, F.linear(states[0], of_state, state_bias), states)
    return ends if several else ends[0]


def recurrent(step: Step, is_zero: IsZero, args: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """What a call of layers gives: the outputs, and the last states of all layers; None for
    what is left to PyTorch: packed sequences, sequences without examples, projected states, and
    dropout between layers, whose random numbers are in another order.
    """
    if len(args) != 9 or not isinstance(args[3], bool):
        return None
    x, states, weights, biases, layers, dropout, training, both_ways, examples_in_front = args
    states = states if isinstance(states, (list, tuple)) else (states,)
    ways, of_a_layer = 1 + both_ways, 4 if biases else 2
    plain = x.ndim == 3 and len(weights) == of_a_layer * layers * ways
    if not plain or (dropout > 0 and training and layers > 1):
        return None
    x = x if examples_in_front else x.transpose(0, 1)
    skip = x.shape[1] > 1  # or a weight would have no part in the output
    last: list[tuple[Tensor, ...]] = []
    for _ in range(layers):
        outputs = []
        for way in range(ways):
            place = len(last)
            own = weights[of_a_layer * place : of_a_layer * (place + 1)]
            start = [None if skip and is_zero(s) else s[place] for s in states]
            y, end = _layer(step, x, start, own, backwards=way == 1)
            outputs.append(y)
            last.append(end)
        x = outputs[0] if ways == 1 else torch.cat(outputs, -1)
    y = x.transpose(0, 1).contiguous()  # laid out as PyTorch's, by which masks are drawn
    ends = [_joined(parts).transpose(0, 1) for parts in zip(*last, strict=True)]
    return (y.transpose(0, 1) if examples_in_front else y, *ends)


def _layer(
    step: Step, x: Tensor, states: States, weights: Sequence[Tensor], *, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs ``[N, S, H]`` of one layer in one direction, and its last states."""
    of_input, of_state, *biases = weights
    input_bias, state_bias = biases or (None, None)
    given = F.linear(x, of_input, input_bias)
    places = range(x.shape[1])
    outputs: list[Tensor] = []
    for place in reversed(places) if backwards else places:
        kept = _product(states[0], of_state, state_bias, len(x))
        states = ends = step(given[:, place], kept, states)
        outputs.append(ends[0])
    return _joined(outputs[::-1] if backwards else outputs), ends


def _product(h: Tensor | None, weight: Tensor, bias: Tensor | None, examples: int) -> Tensor | None:
    if h is not None:
        return F.linear(h, weight, bias)
    return None if bias is None else bias.expand(examples, -1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.unsqueeze(1) for part in parts], 1)
