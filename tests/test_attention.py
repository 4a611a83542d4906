"""Forwards with softmax, products of values, masks, and attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from doors import check_native
from networks import episodes, gradients
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import fastmaml
from fastmaml import TaskBatch
from fastmaml.program.capture import capture
from fastmaml.program.examples_in_front import ExamplesInFront
from fastmaml.program.trace import NotCovered
from fastmaml.testing import relative_error, sequential_maml

PLACES, WIDTH, HEADS = 5, 6, 2


class Attention(nn.Module):
    """Sequences ``[N, places, width]`` to three scores, by ``attend(m, q, k, v)``, each
    ``[N, heads, places, width of a head]``.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend, self.project = attend, nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.register_buffer("lower", torch.tril(torch.ones(1, 1, 8, 8)))
        self.register_buffer("distance", torch.randn(PLACES, PLACES))

    def forward(self, x: Tensor) -> Tensor:
        n, places, width = x.shape
        parts = self.project(x).split(width, 2)
        q, k, v = (p.view(n, places, HEADS, width // HEADS).transpose(1, 2) for p in parts)
        y = self.attend(self, q, k, v).transpose(1, 2).contiguous().view(n, places, width)
        return self.head((x + self.out(y)).mean(1))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def _causal(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    scores = _scores(q, k).masked_fill(m.lower[:, :, :n, :n] == 0, float("-inf"))
    return F.softmax(scores, dim=-1) @ v


def _chosen(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(PLACES, PLACES, dtype=torch.bool).tril(1)
    return torch.where(allowed, _scores(q, k), torch.tensor(-1e4, dtype=q.dtype)).softmax(-1) @ v


def _ruled_out(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = m.distance + 10 * torch.eye(PLACES) > 0
    nothing = torch.tensor(-math.inf, dtype=q.dtype)
    scores = torch.where(seen, _scores(q, k), nothing)
    return scores.masked_fill(m.distance > 9, nothing).softmax(-1) @ v


def _added(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = q.flatten(0, 1), k.flatten(0, 1).mT
    scores = torch.baddbmm(m.distance, *heads, alpha=0.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(q.shape)


def _entropies(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p, log_p = _scores(q, k).softmax(-1), _scores(q, k).log_softmax(-1)
    return p @ v + (p * log_p).sum(-1, keepdim=True)


ATTEND: dict[str, Callable[..., Tensor]] = {
    "written out": lambda m, q, k, v: _scores(q, k).softmax(-1) @ v,
    "causal": _causal,
    "chosen": _chosen,
    "ruled out": _ruled_out,
    "some see nothing": lambda m, q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=(m.distance > 0) & (torch.arange(PLACES)[:, None] > 0)
    ),
    "added": _added,
    "entropies": _entropies,
    "over queries": lambda m, q, k, v: _scores(q, k).softmax(2) @ v,
    "over heads": lambda m, q, k, v: _scores(q, k).softmax(1) @ v,
    "linear": lambda m, q, k, v: F.elu(q) @ (k.softmax(-2).transpose(-2, -1) @ v),
    "in one call": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "in one call, causal": lambda m, q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True
    ),
    "in one call, biased": lambda m, q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=m.distance, scale=0.3
    ),
    "in one call, masked": lambda m, q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=m.lower[0, 0, :PLACES, :PLACES] > 0
    ),
    "with dropout": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3),
}


def _episodes() -> TaskBatch:
    return episodes((PLACES, WIDTH), support=4, query=3)


@pytest.mark.parametrize("name", ATTEND)
def test_native_attention(name: str) -> None:
    torch.manual_seed(1)
    doors = (1, 3) if name == "with dropout" else (1, 2, 3)
    check_native(Attention(ATTEND[name]).double(), _episodes(), 0.3, doors)


class Encoded(nn.Module):
    """``f(m, x)`` of sequences with learned places, and scores."""

    def __init__(self, f: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.f, self.parts, self.head = f, nn.ModuleList(parts), nn.Linear(WIDTH, 3)
        self.places = nn.Parameter(torch.randn(1, PLACES + 2, WIDTH))
        mask = torch.triu(torch.full((PLACES, PLACES), -math.inf), 1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places[:, : x.shape[1]]
        return self.head(self.f(self, x).mean(1))


def _multi_head(**kwargs: object) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **kwargs)


def _layer(**kwargs: object) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True, **kwargs)


def _itself(m: Encoded, x: Tensor, **kwargs: object) -> Tensor:
    return m.parts[0](x, x, x, **kwargs)[0]


def _with_its_weights(m: Encoded, x: Tensor) -> Tensor:
    y, weights = m.parts[0](x, x, x, average_attn_weights=len(m.parts) > 1)
    return y * weights.flatten(1, -2).sum(1).unsqueeze(-1)


def _of_another(m: Encoded, x: Tensor) -> Tensor:
    other = torch.tanh(m.parts[1](x))
    return m.parts[0](x, other, 2 * other)[0]


ENCODERS: dict[str, tuple[Callable[..., Tensor], Callable[[], list[nn.Module]]]] = {
    "itself": (_itself, lambda: [_multi_head()]),
    "without weights": (
        lambda m, x: _itself(m, x, need_weights=False), lambda: [_multi_head(bias=False)],
    ),
    "causal": (
        lambda m, x: _itself(m, x, attn_mask=m.mask, is_causal=True, need_weights=False),
        lambda: [_multi_head()],
    ),
    "masked": (lambda m, x: _itself(m, x, attn_mask=m.mask), lambda: [_multi_head()]),
    "masked by booleans": (
        lambda m, x: _itself(m, x, attn_mask=m.mask < 0), lambda: [_multi_head()],
    ),
    "its weights": (_with_its_weights, lambda: [_multi_head()]),
    "its mean weights": (_with_its_weights, lambda: [_multi_head(), nn.Identity()]),
    "another": (_of_another, lambda: [_multi_head(), nn.Linear(WIDTH, WIDTH)]),
    "another of other widths": (
        _of_another, lambda: [_multi_head(kdim=4, vdim=4), nn.Linear(WIDTH, 4)],
    ),
    "dropout of weights": (_itself, lambda: [_multi_head(dropout=0.3)]),
    "a layer": (lambda m, x: m.parts[0](x), lambda: [_layer(dropout=0.2)]),
    "a layer in evaluation": (lambda m, x: m.parts[0](x), lambda: [_layer().eval()]),
    "an encoder": (
        lambda m, x: m.parts[0](x, mask=m.mask, is_causal=True),
        lambda: [
            nn.TransformerEncoder(
                _layer(dropout=0.0, norm_first=True, activation="gelu"), 2,
                enable_nested_tensor=False,
            )
        ],
    ),
    "a decoder": (
        lambda m, x: m.parts[0](x, x * 0.5, tgt_mask=m.mask),
        lambda: [nn.TransformerDecoderLayer(WIDTH, HEADS, 8, dropout=0.1, batch_first=True)],
    ),
}  # fmt: skip


DRAWING = ("dropout of weights", "a layer", "a decoder")


def _encoded(name: str) -> nn.Module:
    f, parts = ENCODERS[name]
    return Encoded(f, *parts())


@pytest.mark.parametrize("name", ENCODERS)
def test_attention_of_pytorchs_modules(name: str) -> None:
    torch.manual_seed(1)
    module, doors = _encoded(name).double(), (1, 3) if name in DRAWING else (1, 2, 3)
    check_native(module, _episodes(), 0.3, doors).adapted(_episodes())


class WhileDrawing(TorchDispatchMode):
    """Whether PyTorch might take another kernel of attention than that in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            self.found.append(torch.backends.cuda.mem_efficient_sdp_enabled())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["with dropout", "a layer"])
def test_attention_with_dropout_is_seen_in_parts(name: str) -> None:
    """On a GPU it would be one call, which is no op, and of other random numbers."""
    module = _encoded(name) if name in ENCODERS else Attention(ATTEND[name])
    with WhileDrawing() as kernels, ExamplesInFront():
        module(torch.randn(3, PLACES, WIDTH))
    assert not kernels.found[0]
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.gpu
def test_dropout_of_attention_on_a_gpu() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.2, batch_first=True)
    module = nn.Sequential(layer, nn.Flatten(), nn.Linear(8 * PLACES, 3)).cuda()
    tasks = episodes((PLACES, 8), support=4, query=3).to("cuda")
    tasks = TaskBatch(*(t.float() if t.is_floating_point() else t for t in tasks))
    torch.manual_seed(2)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = sequential_maml(module, tasks, 0.1)
    maml = fastmaml.MAML(module, 0.1)
    torch.manual_seed(2)
    maml.meta_loss(tasks).backward()
    assert not maml.programs.found_none
    assert relative_error(gradients(module), expected) < 1e-3


def test_attention_that_sees_examples_as_places_is_left_to_pytorch() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS)
    with pytest.raises(NotCovered, match=r"moves the examples|whose first axis|mix"):
        capture(Encoded(_itself, module), torch.randn(6, PLACES, WIDTH))


@pytest.mark.parametrize("mask", [None, torch.zeros(1, PLACES)])
def test_what_pytorch_refuses_is_refused(mask: Tensor | None) -> None:
    kwargs = {"attn_mask": mask, "is_causal": mask is None}
    module = Encoded(lambda m, x: _itself(m, x, **kwargs), _multi_head()).double()
    x = torch.randn(4, PLACES, WIDTH, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        module(x)
    with pytest.raises(NotCovered):
        capture(module, x)


class Classifier(nn.Module):
    """PyTorch's own example of a classifier for digits, smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc1, self.fc2 = nn.Linear(24, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.flatten(F.max_pool2d(F.relu(self.conv2(x)), 2), 1)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def test_log_probabilities_of_images() -> None:
    torch.manual_seed(1)
    module, loss = Classifier().double(), nn.NLLLoss(reduction="sum")
    x, y = torch.randn(2, 3, 4, 1, 14, 14).double(), torch.randint(3, (2, 3, 4))
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    total, expected = sequential_maml(module, batch, 0.05, loss=loss)
    module.zero_grad()
    maml = fastmaml.MAML(module, lr=0.05)
    value = maml.meta_loss(batch, loss=loss)
    value.backward()
    assert not maml.programs.found_none
    torch.testing.assert_close(value.detach(), total.detach())
    assert relative_error(gradients(module), expected) < 1e-11


class Forward(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.layer = f, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.layer(x))


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x: x.softmax(0), "a softmax over examples"),
        (lambda x: x.softmax(1, dtype=torch.float64), "change of dtype"),
        (
            lambda x: x.masked_fill(torch.arange(3) > 1, x.detach().sum()),
            "detached|depends on the input|over examples",
        ),
        (lambda x: x @ x.mT, "moves the examples"),
        (lambda x: x.reshape(1, -1, 3) @ x.reshape(1, 3, -1), "side by side|mixes examples"),
    ],
)
def test_refusals(f: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        capture(Forward(f), torch.randn(6, 3))
