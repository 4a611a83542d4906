"""Calls that are lowered to ops of other names: forwards with them are native, and agree with the
loop over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from doors import by_door, check_native, check_on_a_gpu
from networks import gradients
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fastmaml
from fastmaml import TaskBatch
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered
from fastmaml.testing import relative_error, sequential_maml

CHANNELS, LENGTH = 4, 6
SIDE = 6


class Spelled(nn.Module):
    """Scores of ``f(m, h)``, h ``[N, CHANNELS, LENGTH]`` or images of two channels."""

    def __init__(self, f: Callable[[Spelled, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.f, self.first = f, nn.Linear(shape[-1], shape[-1])
        self.w, self.v = nn.Parameter(torch.randn(LENGTH, 5)), nn.Parameter(torch.rand(LENGTH))
        self.centres = nn.Parameter(torch.randn(3, LENGTH))
        self.line = nn.Conv1d(CHANNELS, 3, 3, stride=2, padding=1)
        self.depthwise = nn.Conv1d(CHANNELS, 2 * CHANNELS, 2, groups=CHANNELS)
        self.wider = nn.ConvTranspose1d(CHANNELS, 2, 3, stride=2, padding=1, output_padding=1)
        self.larger = nn.ConvTranspose2d(
            2, 3, (3, 2), stride=(2, 3), padding=(0, 1), dilation=(1, 2)
        )
        self.turned = nn.ConvTranspose2d(2, 3, 3, bias=False, padding=2)
        self.normed = weight_norm(nn.Linear(LENGTH, 3))
        self.normed_line = weight_norm(nn.Conv1d(CHANNELS, 3, 3, padding=2, dilation=2))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("waves", torch.randn(LENGTH, 3))
        self.register_buffer("graph", torch.rand(CHANNELS, CHANNELS))
        with torch.no_grad():
            features = f(self, torch.randn(2, *shape)).flatten(1).shape[1]
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self, torch.tanh(self.first(x))).flatten(1))


def _cosines(m: Spelled, h: Tensor) -> Tensor:
    return F.linear(F.normalize(h, dim=-1), F.normalize(m.centres, dim=-1))


def _low_rank(m: Spelled, h: Tensor) -> Tensor:
    return F.linear(h, m.first.weight + m.w @ m.w.t() / 10, m.first.bias)


def _attention_pooled(m: Spelled, h: Tensor) -> Tensor:
    return ((h @ m.v).softmax(1)[..., None] * h).sum(1)


def _standardised(m: Spelled, h: Tensor) -> Tensor:
    return (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 0.1)


def _rotary(m: Spelled, h: Tensor) -> Tensor:
    turns = torch.arange(CHANNELS, dtype=h.dtype)[:, None] + torch.tensor([0.1, 0.5, 1.0])
    x, y = h.chunk(2, -1)
    h = torch.cat([x * turns.cos() - y * turns.sin(), x * turns.sin() + y * turns.cos()], -1)
    return F.scaled_dot_product_attention(h, h, m.first(h), is_causal=True)


def _norms_by_step(m: Spelled, h: Tensor) -> Tensor:
    y = F.batch_norm(h.mT, None, None, m.w[:, 1], m.w[:, 2], training=True).mT
    y = y + F.layer_norm(h, (LENGTH,), 1 + m.v.tanh(), m.w[:, 0])
    return torch.cat(
        [y[:, 0] * F.batch_norm(y[:, 1], None, None, m.centres[1], training=True), y[:, 2]], 1
    )


def _from_a_context(m: Spelled, h: Tensor) -> Tensor:
    return h * torch.sigmoid(m.first(m.v))


LINES: dict[str, Callable[[Spelled, Tensor], Tensor]] = {
    "conv1d": lambda m, h: m.norm(m.line(h)),
    "depthwise conv1d": lambda m, h: m.depthwise(h),
    "pooled conv1d": lambda m, h: F.max_pool1d(F.avg_pool1d(m.line(h), 2, 1), 2),
    "transposed conv1d": lambda m, h: m.wider(h),
    "amax": lambda m, h: h.amax(1) + h.relu().amin((1, 2))[:, None],
    "max": lambda m, h: h.max(1)[0] * h.min(-1, keepdim=True).values.sum(1),
    "adaptive maximum": lambda m, h: F.adaptive_max_pool1d(h, 3),
    "logsumexp": lambda m, h: h.logsumexp(1) * torch.logsumexp(h, (1, 2))[:, None],
    "variance": lambda m, h: h.var(1) + h.var((1, 2), unbiased=False)[:, None],
    "deviation": _standardised,
    "rms norms": lambda m, h: F.rms_norm(h, (LENGTH,), m.v) * F.rms_norm(h, h.shape[1:], eps=0.1),
    "variance and mean": lambda m, h: torch.cat(torch.var_mean(h, 1), 1),
    "norms": lambda m, h: h.norm(dim=(1, 2))[:, None] + h.norm(math.inf, 1) + h.norm(1, 1),
    "flipped": lambda m, h: h.flip(1, 2) * h.roll(2, 2),
    "every other": lambda m, h: h[:, ::2, 1::3],
    "chosen": lambda m, h: h[:, [-1, 0, 0, 1]] * h[..., torch.tensor([1])],
    "repeated": lambda m, h: h.repeat(1, 2, 1).tile(1, 1, 2),
    "windows": lambda m, h: h.unfold(2, 3, 2).mean(-1),
    "taken apart": lambda m, h: torch.stack([t.sin() for t in h.unbind(2)]).sum(0),
    "triangle": lambda m, h: (h @ h.mT).tril().triu(-1),
    "diagonal": lambda m, h: (h @ h.mT).diagonal(dim1=1, dim2=2),
    "reflected": lambda m, h: F.pad(h, (2, 1), mode="reflect") + F.pad(h, (1, 2), mode="replicate"),
    "stretched": lambda m, h: F.interpolate(h, scale_factor=2),
    "resized": lambda m, h: F.interpolate(h, scale_factor=1.7, mode="linear"),
    "resized to its ends": lambda m, h: F.interpolate(h, 4, mode="linear", align_corners=True),
    "matrix": lambda m, h: h @ m.w,
    "matrix and bias": lambda m, h: torch.addmm(m.v, h[:, 0], m.first.weight),
    "vector": _attention_pooled,
    "buffer": lambda m, h: (h @ m.waves).sin(),
    "graph": lambda m, h: torch.relu(m.graph @ h @ m.w),
    "einsum": lambda m, h: torch.einsum("ncl,lk->nck", h, m.w),
    "computed matrix": lambda m, h: h @ (m.w * 2).softmax(0),
    "tied": lambda m, h: F.linear(m.first(h).tanh(), m.first.weight.t()) + m.first.weight.sum(0),
    "low rank": _low_rank,
    "cosines": _cosines,
    "context": _from_a_context,
    "softmax of a parameter": lambda m, h: h * m.v.softmax(0) * m.v.std(),
    "transposed parameter": lambda m, h: h * m.w.t()[2] + m.w.t().norm(dim=1).sum(),
    "powers": lambda m, h: 2**h + torch.exp2(h) + (1 + h * h).log2() + (1 + h * h).log10(),
    "sums of products": lambda m, h: torch.addcmul(h, h, h, value=0.5).addcdiv(h, 2 + h),
    "between": lambda m, h: torch.lerp(h, h * h, 0.3),
    "log of sums": lambda m, h: torch.logaddexp(50 * h, h * h),
    "running sums": lambda m, h: h.cumsum(1) * h.cumsum(-1),
    "cosine": lambda m, h: F.cosine_similarity(h[:, :, None], m.centres, dim=-1),
    "one-hot numbers": lambda m, h: h * F.one_hot(torch.arange(CHANNELS) % 3, LENGTH),
    "rotary places": _rotary,
    "norms by step": _norms_by_step,
}  # fmt: skip

IMAGES: dict[str, Callable[[Spelled, Tensor], Tensor]] = {
    "transposed": lambda m, h: m.larger(h),
    "transposed without bias": lambda m, h: m.turned(h),
    "upsampled": lambda m, h: F.interpolate(h, scale_factor=(2, 1.5), mode="nearest"),
    "upsampled exactly": lambda m, h: F.interpolate(h, size=(4, 9), mode="nearest-exact"),
    "bilinear": lambda m, h: F.interpolate(h, scale_factor=(2, 1.3), mode="bilinear"),
    "bilinear to corners": lambda m, h: F.interpolate(
        h, size=(9, 4), mode="bilinear", align_corners=True
    ),
    "bicubic": lambda m, h: F.interpolate(h, size=(4, 9), mode="bicubic"),
    "areas": lambda m, h: F.interpolate(h, size=(4, 9), mode="area"),
    "pixels to channels": lambda m, h: F.pixel_unshuffle(h, 3),
    "shuffled channels": lambda m, h: F.channel_shuffle(h, 2),
    "pixel shuffle": lambda m, h: F.pixel_shuffle(h.repeat(1, 4, 1, 1), 2),
    "patches": lambda m, h: F.unfold(h, 3, stride=2, padding=1),
    "maxima": lambda m, h: torch.cat([h.amax((2, 3)), F.adaptive_max_pool2d(h, 2).flatten(1)], 1),
    "turned": lambda m, h: h.rot90(1, (2, 3)) * F.pad(h, (2, 1, 0, 0), mode="replicate")[..., 3:],
    "deviations": lambda m, h: h.std((2, 3)),
}  # fmt: skip


def _episodes(shape: tuple[int, ...]) -> TaskBatch:
    g = torch.Generator().manual_seed(4)
    x = [torch.randn(3, n, *shape, generator=g, dtype=torch.float64) for n in (5, 4)]
    y = [torch.randint(3, (3, n), generator=g) for n in (5, 4)]
    return TaskBatch(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("name", LINES)
def test_lines(name: str) -> None:
    torch.manual_seed(1)
    module = Spelled(LINES[name], (CHANNELS, LENGTH)).double()
    check_native(module, _episodes((CHANNELS, LENGTH)), 0.3)


def _normed(weight: nn.Module) -> Tensor:
    length, v = weight.original0, weight.original1
    return v * (length / v.norm(dim=tuple(range(1, v.ndim)), keepdim=True))


def _written_out(m: Spelled, h: Tensor) -> Tensor:
    y = F.conv1d(h, _normed(m.normed_line.parametrizations.weight), m.normed_line.bias, 1, 2, 2)
    return F.linear(h, _normed(m.normed.parametrizations.weight), m.normed.bias).sum(1) + y.sum(2)


@pytest.mark.parametrize("door", [1, 2, 3])
def test_weight_norm(door: int) -> None:
    """Written out: of its own call PyTorch's second derivative is wrong."""
    torch.manual_seed(1)
    shape = (CHANNELS, LENGTH)
    module = Spelled(lambda m, h: m.normed(h).sum(1) + m.normed_line(h).sum(2), shape).double()
    plain = Spelled(_written_out, shape).double()
    plain.load_state_dict(module.state_dict())
    _, expected = sequential_maml(plain, _episodes(shape), 0.3, 2)
    maml = fastmaml.MAML(module, 0.3, allow_unused=True)
    by_door(maml, _episodes(shape), 2, door).backward()
    assert not maml.programs.found_none
    assert relative_error(gradients(module), expected) < 1e-11


def test_a_scale_is_taken_as_it_is_given() -> None:
    torch.manual_seed(1)
    for recomputed in (False, True):
        given = {"scale_factor": 1.45, "mode": "bilinear", "recompute_scale_factor": recomputed}
        module = Spelled(lambda m, h, given=given: F.interpolate(h, **given), (2, SIDE, SIDE))
        check_native(module.double(), _episodes((2, SIDE, SIDE)), 0.3, doors=(3,))


def test_long_axes_are_resized_by_pytorch() -> None:
    module = Spelled(lambda m, h: F.interpolate(h, 2000, mode="linear"), (CHANNELS, 9))
    with pytest.raises(NotCovered, match="more than 16384 weights of an axis to resize"):
        capture(module, torch.randn(4, CHANNELS, 9))


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    torch.manual_seed(1)
    module = Spelled(IMAGES[name], (2, SIDE, SIDE)).double()
    check_native(module, _episodes((2, SIDE, SIDE)), 0.3)


ON_A_GPU = [
    (1, "conv1d"),
    (1, "matrix"),
    (3, "transposed conv1d"),
    (3, "chosen"),
    (3, "cosines"),
    (3, "max"),
    (3, "rms norms"),
    (3, "transposed"),
    (3, "upsampled"),
    (3, "bilinear"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("door", "name"), ON_A_GPU)
def test_on_a_gpu(door: int, name: str) -> None:
    shape = (CHANNELS, LENGTH) if name in LINES else (2, SIDE, SIDE)
    torch.manual_seed(1)
    check_on_a_gpu(Spelled((LINES | IMAGES)[name], shape), _episodes(shape), 0.1, door)
