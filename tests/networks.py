"""Networks and batches for the tests of whole meta-gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml import TaskBatch
from fastmaml.vision.models import CNN4, OmniglotCNN, OmniglotFC


class Residual(nn.Module):
    """A convolutional block with a skip connection and a scaled branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, (3, 1), padding=(1, 0), bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = F.silu(self.norm(self.second(h)) * 0.5 + h)
        return self.head(F.adaptive_avg_pool2d(h, 2).flatten(1))


class Gated(nn.Module):
    """Squeeze and excitation, then a gated layer and a centred one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.squeeze = nn.Linear(6, 3)
        self.excite = nn.Linear(3, 6)
        self.up = nn.Linear(6, 5)
        self.gate = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        weights = torch.sigmoid(self.excite(F.silu(self.squeeze(h.mean((2, 3))))))
        h = (h * weights[:, :, None, None]).mean((2, 3))
        h = self.up(h) * F.silu(self.gate(h))
        return self.head(1 - (h - h.mean(1, keepdim=True)) * h)


class Dense(nn.Module):
    """Every block reads all that came before it; the halves of a layer gate each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(6, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.layer = nn.Linear(9, 10)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([x, torch.tanh(self.first(x))], 1)
        h = torch.cat([F.silu(self.norm(self.second(h))), h], dim=1)
        rows, centre = h[:, :, 1:].sum((2, 3)), h[..., 2, -3]
        values, rest = self.layer(torch.sin(rows / 12 + centre)).split([8, 2], 1)
        return self.head(torch.cat((F.glu(values), rest, values[:, 3:4]), -1))


class Cumulative(nn.Module):
    """Products of the features up to each: what has no native program."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumprod(-1)


class Padded(nn.Module):
    """Zeros and other constants around images and rows, and sides cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(2, 5, (2, 4)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(torch.tanh(self.conv(x)), (1, -2, 0, 3), value=0.5)
        return self.head(F.pad(h.sin().mean((2, 3)), (2, 1)))


class Scaled(nn.Module):
    """Layer scale, embeddings of places, a token in front, a temperature and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 3)
        self.scale, self.places = nn.Parameter(torch.randn(6, 1, 1)), nn.Parameter(torch.randn(20))
        self.token = nn.Parameter(torch.randn(1, 6, 1))
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        h = (torch.tanh(self.conv(x)) * self.scale).flatten(2) + self.places
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 2)
        return self.head(torch.tanh(h)[:, :, :9].mean(2)) * self.temperature


class Coordinates(nn.Module):
    """A convolution that sees where it is, and a constant for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (
            torch.linspace(-1, 1, size, dtype=x.dtype, device=x.device) for size in x.shape[2:]
        )
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        h = self.conv(torch.cat([x, places.expand(len(x), -1, -1, -1)], 1))
        factors = torch.arange(1, 6, dtype=x.dtype, device=x.device)
        return self.head(torch.tanh(h).mean((2, 3)) * factors)


class Mixer(nn.Module):
    """A layer over positions, then one over channels, on a permuted input."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Linear(6, 6)
        self.channels = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + F.gelu(self.positions(x.transpose(1, 2))).transpose(1, 2)
        return self.channels(h).mean(1)


class Sequences(nn.Module):
    """Attention through a mask between root-mean-square norms, learned places, and
    log-probabilities.
    """

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)
        self.places, self.scale = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.tril(torch.ones(6, 6)))

    def _normed(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.exp(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        n, places, width = x.shape
        h = x + self.places[:places]
        parts = self.project(self._normed(h)).chunk(3, dim=-1)
        q, k, v = (p.view(n, places, 2, width // 2).transpose(1, 2) for p in parts)
        scores = (q @ k.mT).masked_fill(self.seen[:places, :places] == 0, -torch.inf)
        h = h + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, places, width))
        return F.log_softmax(self.head(F.normalize(h.mean(1), dim=-1)), dim=-1)


class Remembering(nn.Module):
    """Rows of a table by constants, added to sequences, which two recurrent layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(5, 4)
        self.first = nn.LSTM(4, 5, batch_first=True)
        self.second = nn.GRU(5, 3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x + self.places(torch.arange(x.shape[1], device=x.device)))
        return self.head(self.second(y)[0].mean(1))


class Tied(nn.Module):
    """One weight matrix used twice, and one parameter that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 5)
        self.again = nn.Linear(5, 5, bias=False)
        self.again.weight = self.embed.weight
        self.head = nn.Linear(5, 3)
        self.unseen = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.embed(x)))))


def mlp(*, batch_norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(3, 7)]
    layers += [nn.BatchNorm1d(7)] if batch_norm else []
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(7, 6), nn.Softplus(), nn.Linear(6, 3))


def layer_normed() -> nn.Module:
    """Norms of rows and of all features, before and behind a product."""
    return nn.Sequential(
        nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.LayerNorm((2, 7)), nn.Linear(7, 5),
        nn.LayerNorm(5, elementwise_affine=False), nn.Softplus(), nn.Flatten(), nn.Linear(10, 3),
    )  # fmt: skip


def group_normed() -> nn.Module:
    """Norms of images: of groups of channels, of each, and of all values."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True), nn.Tanh(),
        nn.LayerNorm((8, 3, 3)), nn.Flatten(), nn.Linear(72, 3),
    )  # fmt: skip


def pooled(kind: type[nn.Module], affine: bool = True, tracking: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        nn.BatchNorm2d(5, affine=affine, track_running_stats=tracking),
        nn.GELU(),
        kind(2, stride=2, padding=1),
        nn.Conv2d(5, 17, 2),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(17 * 4 * 2, 3),
    )


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.Hardswish(),
        nn.AvgPool2d(2),
        nn.Conv2d(5, 4, 2),
        nn.Mish(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 6),
        nn.CELU(0.5),
        nn.Linear(6, 3),
    )


def separable(groups: int = 1) -> nn.Module:
    """Depthwise layers, one of which has strides, and products in between; or fewer groups."""
    return nn.Sequential(
        nn.Conv2d(2, 20, 1),
        nn.Tanh(),
        nn.Conv2d(20, 20, 3, stride=2, padding=1, groups=20 // groups, bias=False),
        nn.BatchNorm2d(20),
        nn.SiLU(),
        nn.Conv2d(20, 40, (2, 3), dilation=(1, 2), padding=2, groups=20 // groups),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 3),
    )


def frozen() -> nn.Module:
    module = mlp(batch_norm=True)
    module[0].weight.requires_grad_(False)
    module[-1].bias.requires_grad_(False)
    return module


def evaluated(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = factory()
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
        return module.eval()

    return make


@dataclass(frozen=True)
class Network:
    """A network, its per-example input shape and number of outputs."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    outputs: int


NETWORKS = {
    "mlp": Network(mlp, (3,), 3),
    "mlp_norm": Network(lambda: mlp(batch_norm=True), (3,), 3),
    "mlp_norm_eval": Network(evaluated(lambda: mlp(batch_norm=True)), (3,), 3),
    "residual": Network(Residual, (2, 7, 6), 3),
    "residual_eval": Network(evaluated(Residual), (2, 7, 6), 3),
    "gated": Network(Gated, (2, 4, 5), 3),
    "dense": Network(Dense, (2, 4, 5), 3),
    "dense_eval": Network(evaluated(Dense), (2, 4, 5), 3),
    "max_pool": Network(lambda: pooled(nn.MaxPool2d), (2, 8, 9), 3),
    "avg_pool": Network(lambda: pooled(nn.AvgPool2d, affine=False, tracking=False), (2, 8, 9), 3),
    "mobile": Network(mobile, (2, 6, 7), 3),
    "depthwise": Network(separable, (2, 7, 6), 3),
    "depthwise_eval": Network(evaluated(separable), (2, 7, 6), 3),
    "groups": Network(lambda: separable(2), (2, 7, 6), 3),
    "wide_groups": Network(lambda: separable(5), (2, 7, 6), 3),
    "layer_norm": Network(layer_normed, (2, 4), 3),
    "group_norm": Network(group_normed, (2, 7, 6), 3),
    "padded": Network(Padded, (2, 5, 4), 3),
    "scaled": Network(Scaled, (2, 5, 4), 3),
    "coordinates": Network(Coordinates, (2, 5, 4), 3),
    "mixer": Network(Mixer, (6, 4), 3),
    "sequences": Network(Sequences, (5, 4), 3),
    "remembering": Network(Remembering, (3, 4), 3),
    "tied_unseen": Network(Tied, (5,), 3),
    "frozen": Network(frozen, (3,), 3),
    "omniglot_fc": Network(lambda: OmniglotFC(28 * 28, 5, sizes=[32, 16]), (1, 28, 28), 5),
    "omniglot_cnn": Network(lambda: OmniglotCNN(5, hidden_size=16), (1, 28, 28), 5),
    "cnn4": Network(lambda: CNN4(5, hidden_size=8, layers=4, embedding_size=8), (3, 20, 20), 5),
}


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The network ``name`` with seeded parameters."""
    torch.manual_seed(seed)
    return NETWORKS[name].make().to(dtype)


def classification(
    name: str,
    *,
    tasks: int = 3,
    support: int = 6,
    query: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> TaskBatch:
    """Random episodes for the network ``name``."""
    network = NETWORKS[name]
    sizes = {"tasks": tasks, "support": support, "query": query}
    return episodes(network.shape, network.outputs, **sizes, dtype=dtype, seed=seed)


def episodes(
    shape: tuple[int, ...],
    classes: int = 3,
    *,
    tasks: int = 3,
    support: int = 6,
    query: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> TaskBatch:
    """Random episodes of examples of this shape."""
    g = torch.Generator().manual_seed(seed)

    def half(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, n, *shape, generator=g, dtype=torch.float64).to(dtype)
        return x, torch.randint(classes, (tasks, n), generator=g)

    return TaskBatch(*half(support), *half(query))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """``.grad`` of every parameter that requires one; zero where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
        if p.requires_grad
    }
