"""The cases: a net, a meta-batch shape and an inner loop each, with data and a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.machine import differentiable_attention
from fastmaml import TaskBatch, testing
from fastmaml.testing import sequential_maml
from fastmaml.vision.models import CNN4, OmniglotCNN, OmniglotFC, ResNet12


def sine_net() -> nn.Module:
    """The regression net of the MAML paper (Finn et al. 2017, section 5.1)."""
    return nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )


def sine_norms() -> nn.Module:
    """The same with layer norms."""
    return nn.Sequential(
        nn.Linear(1, 40), nn.LayerNorm(40), nn.ReLU(),
        nn.Linear(40, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 1),
    )  # fmt: skip


def omniglot_group_norm() -> nn.Module:
    """Four pooled convolutions of 32 channels, with group norms."""
    layers: list[nn.Module] = []
    for channels in (1, 32, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.GroupNorm(8, 32)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5))


def sequence_encoder() -> nn.Module:
    """Two of PyTorch's transformer layers over 16 places, no dropout, to have an oracle."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Linear(8, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Flatten(), nn.Linear(16 * 32, 5),
    )  # fmt: skip


class LastOutput(nn.Module):
    """Of a recurrent layer, whose places come behind the examples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


def recurrent_classifier() -> nn.Module:
    """An LSTM of 32 units over 16 places."""
    return nn.Sequential(LastOutput(nn.LSTM(8, 32, batch_first=True)), nn.Linear(32, 5))


def small_vision_transformer() -> nn.Module:
    """Three layers over the patches, 8x8 each, of 32x32 images."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=5)


def cifar_resnet() -> nn.Module:
    """ResNet-12 for CIFAR-FS: 32x32 images, no average pooling; no dropout, to have an oracle."""
    return ResNet12(5, hidden_size=2048, avg_pool=False, wider=False, dropblock_dropout=0.0)


@dataclass(frozen=True)
class Case:
    """One meta-step to time: `tasks` tasks, `steps` inner steps of size `lr`, second order."""

    name: str
    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tasks: int
    support: int
    query: int
    steps: int
    lr: float
    ways: int = 5
    regression: bool = False
    seed: int = 0
    device: str = "cpu"

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss if self.regression else F.cross_entropy

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The net in training mode; the float64 one holds the float32 one's values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.net().to(self.device, dtype).train()

    def batch(self, dtype: torch.dtype = torch.float32) -> TaskBatch:
        """Random tasks; the float64 ones hold the float32 ones' values."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        draw = self._draw_sines if self.regression else self._draw_images
        support, query = (draw(n, generator) for n in (self.support, self.query))
        x, y = zip(support, query, strict=True)
        x = [t.to(self.device, dtype) for t in x]
        y = [t.to(self.device, dtype if self.regression else t.dtype) for t in y]
        return TaskBatch(x[0], y[0], x[1], y[1])

    def _draw_sines(self, examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.rand(self.tasks, examples, 1, generator=generator) * 10 - 5
        amplitude = torch.linspace(0.1, 5.0, self.tasks).view(-1, 1, 1)
        phase = torch.linspace(0.0, torch.pi, self.tasks).view(-1, 1, 1)
        return x, amplitude * torch.sin(x + phase)

    def _draw_images(self, examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.rand(self.tasks, examples, *self.shape, generator=generator)
        y = (torch.arange(examples) % self.ways).repeat(self.tasks, 1)
        return x, y

    def resized(self, **changes: int) -> Case:
        """The same case with another number of tasks, steps, support or query examples."""
        if not changes:
            return self
        suffix = "".join(f" {key}={value}" for key, value in changes.items())
        return replace(self, name=self.name + suffix, **changes)


CASES = {
    case.name: case
    for case in (
        Case("sine", sine_net, (1,), 25, 10, 10, steps=1, lr=0.01, ways=1, regression=True),
        Case("sine5", sine_net, (1,), 25, 10, 10, steps=5, lr=0.01, ways=1, regression=True),
        Case("omnifc", lambda: OmniglotFC(28 * 28, 5), (1, 28, 28), 32, 5, 5, steps=1, lr=0.4),
        Case("omni51", lambda: OmniglotCNN(5), (1, 28, 28), 32, 5, 5, steps=1, lr=0.4),
        Case("omni55", lambda: OmniglotCNN(5), (1, 28, 28), 32, 5, 75, steps=5, lr=0.1),
        Case("mini51", lambda: CNN4(5, hidden_size=32), (3, 84, 84), 4, 5, 75, steps=5, lr=0.01),
        Case("resnet12", cifar_resnet, (3, 32, 32), 2, 5, 75, steps=1, lr=0.01),
        Case("encoder", sequence_encoder, (16, 8), 16, 5, 15, steps=3, lr=0.05),
        Case("lstm", recurrent_classifier, (16, 8), 16, 5, 15, steps=3, lr=0.05),
        Case("vit", small_vision_transformer, (3, 32, 32), 4, 5, 15, steps=3, lr=0.05),
        Case("sinelayer", sine_norms, (1,), 25, 10, 10, steps=5, lr=0.01, ways=1, regression=True),
        Case("omnigroup", omniglot_group_norm, (1, 28, 28), 16, 5, 5, steps=5, lr=0.01),
    )
}


def _family(base: Case, nets: dict[str, _Net], wide: Callable[[int], nn.Module]) -> list[Case]:
    """A tuned case, and the same with other nets, other images, and 7 and 20 ways."""
    stem = base.name[:4]
    cases = [
        replace(base, name=f"{stem}-{name}", net=net, shape=shape)
        for name, (net, shape) in nets.items()
    ]
    for ways in (7, 20):
        sizes = {"ways": ways, "support": ways, "query": max(ways, base.query)}
        cases.append(replace(base, name=f"{stem}-{ways}way", net=partial(wide, ways), **sizes))
    return [base, *cases]


_Net = tuple[Callable[[], nn.Module], tuple[int, ...]]  # and the shape of an example
_strided = partial(CNN4, 5, channels=1, max_pool=False)
# Shapes that no kernel was tuned for, each family behind a tuned one. Of 16 channels nothing is
# padding: the difference to 17 is what padding costs.
SHAPES = {
    "omni": _family(
        CASES["omni51"],
        {
            "h16": (partial(OmniglotCNN, 5, hidden_size=16), (1, 28, 28)),
            "h17": (partial(OmniglotCNN, 5, hidden_size=17), (1, 28, 28)),
            "h48": (partial(OmniglotCNN, 5, hidden_size=48), (1, 28, 28)),
            "20x20": (partial(_strided, embedding_size=64 * 2 * 2), (1, 20, 20)),
            "33x47": (partial(_strided, embedding_size=64 * 3 * 3), (1, 33, 47)),
        },
        OmniglotCNN,
    ),
    "mini": _family(
        CASES["mini51"].resized(tasks=2, query=15, steps=2),
        {
            "h16": (partial(CNN4, 5, hidden_size=16), (3, 84, 84)),
            "h17": (partial(CNN4, 5, hidden_size=17), (3, 84, 84)),
            "h48": (partial(CNN4, 5, hidden_size=48), (3, 84, 84)),
            "20x20": (partial(CNN4, 5, hidden_size=32, embedding_size=32), (3, 20, 20)),
            "33x47": (partial(CNN4, 5, hidden_size=32, embedding_size=32 * 2 * 2), (3, 33, 47)),
        },
        partial(CNN4, hidden_size=32),
    ),
}


def find(name: str) -> Case:
    """A case of `CASES` or `SHAPES`."""
    shapes = {case.name: case for family in SHAPES.values() for case in family}
    return {**shapes, **CASES}[name]


def oracle(case: Case) -> list[Tensor]:
    """The meta-gradient in float64 by double backward, in the order of `model.parameters()`; on the
    CPU, wherever the case is.

    One task at a time, so that no more than one task's graph is in memory.
    """
    model, batch = case.model(torch.float64), case.batch(torch.float64)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for t in range(case.tasks):
        task = TaskBatch(*(x[t : t + 1] for x in batch))
        with differentiable_attention():
            _, grads = sequential_maml(model, task, case.lr, case.steps, case.loss)
        for sum_, g in zip(total, grads.values(), strict=True):
            sum_ += g / case.tasks
    return [t.cpu() for t in total]


def relative_error(grads: list[Tensor], reference: list[Tensor]) -> float:
    """|grads - reference| / |reference| over all parameters together; NaN counts as infinite."""
    here = [g.cpu() for g in grads]
    error = testing.relative_error(dict(enumerate(here)), dict(enumerate(reference)))
    return error if error == error else float("inf")


@cache
def useful_gflop(case: Case) -> float:
    """Multiplications and additions (10^9) that the exact adjoint needs for one meta-step.

    Products alone, without a convolution's padding taps, activations saved: a gradient is 3 forward
    passes, a Hessian-vector product 6 more; a layer that reads the data needs no gradient for its
    input, and its input has no tangent: 2 and 2.
    """
    first, later = _forward_flop(case)
    gradients = case.support * case.steps + case.query
    products = case.support * case.steps
    flop = first * (2 * gradients + 2 * products) + later * (3 * gradients + 6 * products)
    return case.tasks * flop / 1e9


def _forward_flop(case: Case) -> tuple[float, float]:
    """Flop of one example's forward pass: in the layer that reads the data, in all else."""
    examples = 2
    layers: list[float] = []
    convolutions = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal convolutions
        if isinstance(module, nn.LSTM):  # of whose products the state's are none of its input's
            places = inputs[0].shape[1]
            layers.append(8.0 * places * module.input_size * module.hidden_size)
        elif isinstance(module, nn.Linear):
            layers.append(2.0 * output[0].numel() * module.in_features)
        elif isinstance(module, nn.Conv2d):
            taps = 1
            for axis in (0, 1):
                taps *= _valid_taps(module, axis, inputs[0].shape[2 + axis], output.shape[2 + axis])
            layers.append(2.0 * taps * module.in_channels * module.out_channels / module.groups)
            convolutions += layers[-1]

    # in float64 recurrent layers come apart into products, of which the counter knows
    model, counter = case.model(torch.float64), FlopCounterMode(display=False)
    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad(), differentiable_attention(), counter:
        model(torch.zeros(examples, *case.shape, device=case.device, dtype=torch.float64))
    counted = counter.get_flop_counts()["Global"]
    other = sum(flop for op, flop in counted.items() if op is not torch.ops.aten.convolution)
    return layers[0], convolutions + other / examples - layers[0]


def _valid_taps(conv: nn.Conv2d, axis: int, size: int, out: int) -> int:
    """How many (output, tap) pairs along one axis read an input rather than padding."""
    padding, stride, dilation = conv.padding, conv.stride[axis], conv.dilation[axis]
    pad = padding[axis] if isinstance(padding, tuple) else dilation * (conv.kernel_size[axis] // 2)
    return sum(
        0 <= o * stride - pad + k * dilation < size
        for o in range(out)
        for k in range(conv.kernel_size[axis])
    )
