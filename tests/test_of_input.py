"""What a forward makes of its input without parameters, and no op is for: masks of padding,
features, indices. In native programs it goes in with the input.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmaml
from fastmaml import TaskBatch
from fastmaml.losses import per_task
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered
from fastmaml.testing import relative_error, sequential_maml

FEATURES, WORDS, PLACES, WIDTH = 6, 9, 5, 8


class OfFeatures(nn.Module):
    """Scores of ``f(m, x)`` of features ``[N, FEATURES]``, of shape ``[N, WIDTH]``."""

    def __init__(self, f: Callable[[OfFeatures, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f
        self.layer, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 3)
        self.table = nn.Parameter(torch.randn(WORDS, WIDTH))
        self.words = nn.Embedding(WORDS, WIDTH)
        self.register_buffer("waves", torch.randn(FEATURES, WIDTH))
        self.register_buffer("order", torch.randperm(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self, x))


def _fourier(m: OfFeatures, x: Tensor) -> Tensor:
    waves = 2 * math.pi * x @ m.waves
    return torch.cat([waves.sin(), waves.cos()], 1)[:, ::2].tanh()


def _standardised(m: OfFeatures, x: Tensor) -> Tensor:
    return m.layer((x - x.mean(0)) / x.std(0, keepdim=True))


def _spectrum(m: OfFeatures, x: Tensor) -> Tensor:
    return m.layer(F.pad(torch.fft.rfft(x).abs(), (0, 2)))


def _sorted(m: OfFeatures, x: Tensor) -> Tensor:
    values, order = x.sort(1)
    return m.layer(values + 0.1 * order.to(x.dtype))


def _signs(m: OfFeatures, x: Tensor) -> Tensor:
    h = m.layer(x)
    return torch.where(x[:, :1] > 0, h, -h.sin()) + h * (x[:, 1:2] < x[:, 2:3])


def _ruled_out(m: OfFeatures, x: Tensor) -> Tensor:
    worst = x.argmin(1, keepdim=True)
    out = torch.zeros_like(x, dtype=torch.bool).scatter_(1, worst, True)
    return m.layer(x.masked_fill(out, 0.0)) * m.layer(x).sigmoid().masked_fill(out[:, :1], 0.5)


def _shifted(m: OfFeatures, x: Tensor) -> Tensor:
    before = torch.zeros_like(x)
    before[:, 1:] = x[:, :-1]
    return m.layer(x - before)


def _changed_between(m: OfFeatures, x: Tensor) -> Tensor:
    """A mask that is written to after it was used."""
    mask = x > 0
    h = m.layer(x * mask)
    mask &= x < 1
    return h + m.layer(x.masked_fill(mask, 1.0))


def _binned(m: OfFeatures, x: Tensor) -> Tensor:
    numbers = torch.bucketize(x, torch.linspace(-1, 1, WORDS - 1, dtype=x.dtype))
    return m.words(numbers).mean(1) + m.words(numbers[:, 0]) + m.table[numbers[:, 1]]


def _chosen_features(m: OfFeatures, x: Tensor) -> Tensor:
    return m.layer(x[:, m.order].flip(1).cumsum(1))


def _without_gradients(m: OfFeatures, x: Tensor) -> Tensor:
    with torch.no_grad():
        steep = x.diff(dim=1, append=x[:, :1]) > 0.5
        size = x.norm(dim=1, keepdim=True)
    return m.layer(x.masked_fill(steep, 0.5) / size) + m.layer(x.detach().roll(1, 1))


def _cut(m: OfFeatures, x: Tensor) -> Tensor:
    with torch.no_grad():
        size = x.norm(dim=1, keepdim=True)
    return m.layer(x / size)


def _nearest(m: OfFeatures, x: Tensor) -> Tensor:
    """Each example looks at its task's others."""
    others = torch.cdist(x, x) + 10 * torch.eye(len(x), dtype=x.dtype)
    return m.layer(x - x[others.argmin(1)])


FORWARDS: dict[str, Callable[[OfFeatures, Tensor], Tensor]] = {
    "fourier": _fourier,
    "standardised": _standardised,
    "spectrum": _spectrum,
    "sorted": _sorted,
    "signs": _signs,
    "ruled out": _ruled_out,
    "shifted": _shifted,
    "changed between": _changed_between,
    "binned": _binned,
    "chosen features": _chosen_features,
    "without gradients": _without_gradients,
    "cut": _cut,
    "nearest": _nearest,
}


def _features(support: int = 5, query: int = 4) -> TaskBatch:
    g = torch.Generator().manual_seed(4)
    x = [torch.randn(3, n, FEATURES, generator=g, dtype=torch.float64) for n in (support, query)]
    y = [torch.randint(3, (3, n), generator=g) for n in (support, query)]
    return TaskBatch(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("name", FORWARDS)
def test_of_features(name: str) -> None:
    torch.manual_seed(1)
    check_native(OfFeatures(FORWARDS[name]).double(), _features(), 0.3).adapted(_features())


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("name", sorted(FORWARDS.keys() - {"changed between"}))
def test_learned_inputs_get_their_whole_gradient(name: str) -> None:
    """But for what PyTorch itself cannot differentiate."""
    torch.manual_seed(1)
    module, batch = OfFeatures(FORWARDS[name]).double(), _features()
    maml = fastmaml.MAML(module, 0.3)

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        x = batch.support_x.clone().requires_grad_()
        (found,) = torch.autograd.grad(run(x).sin().sum(), x, allow_unused=True)
        return torch.zeros_like(x) if found is None else found

    expected = gradient(lambda x: torch.stack([module(task) for task in x]))
    one_by_one = gradient(lambda x: torch.stack([maml.clone()(task) for task in x]))
    torch.testing.assert_close(one_by_one, expected)
    torch.testing.assert_close(gradient(maml.clone(tasks=3)), expected)


class Words(nn.Module):
    """Sentences, padded by zeros."""

    def __init__(self, f: Callable[[Words, Tensor], Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.f = f
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout, batch_first=True)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.score, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self, x))


def _mean_of_words(h: Tensor, kept: Tensor) -> Tensor:
    return (h * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)


def _transformer(m: Words, x: Tensor) -> Tensor:
    return _mean_of_words(m.encoder(m.words(x), src_key_padding_mask=x == 0), x != 0)


def _causal(m: Words, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(m.score.weight)
    padded = torch.zeros_like(x, dtype=mask.dtype).masked_fill(x == 0, -1e9)
    h = m.words(x)
    h = m.attention(h, h, h, key_padding_mask=padded, attn_mask=mask)[0]
    last = torch.arange(x.shape[1], device=x.device) == (x != 0).sum(1, keepdim=True) - 1
    return (h * last[..., None]).sum(1)


def _pooled(m: Words, x: Tensor) -> Tensor:
    h = m.words(x)
    scores = m.score(h)[..., 0].masked_fill(x == 0, -math.inf)
    return (scores.softmax(1)[..., None] * h).sum(1)


def _lengths(m: Words, x: Tensor) -> Tensor:
    lengths = (x != 0).sum(1, keepdim=True)
    return _mean_of_words(m.words(x).tanh(), torch.arange(x.shape[1]) < lengths) * lengths.log()


SENTENCES: dict[str, Callable[[Words, Tensor], Tensor]] = {
    "transformer": _transformer,
    "causal": _causal,
    "pooled": _pooled,
    "lengths": _lengths,
}


def _sentences() -> TaskBatch:
    g = torch.Generator().manual_seed(4)
    places = torch.arange(PLACES)

    def half(n: int) -> tuple[Tensor, Tensor]:
        words = torch.randint(1, WORDS, (3, n, PLACES), generator=g)
        lengths = torch.randint(1, PLACES + 1, (3, n, 1), generator=g)
        return words * (places < lengths), torch.randint(3, (3, n), generator=g)

    return TaskBatch(*half(4), *half(6))


@pytest.mark.parametrize("name", SENTENCES)
def test_of_padded_sentences(name: str) -> None:
    torch.manual_seed(1)
    check_native(Words(SENTENCES[name]).double(), _sentences(), 0.3).adapted(_sentences())


@pytest.mark.parametrize("door", [1, 3])
def test_random_numbers_beside(door: int) -> None:
    torch.manual_seed(1)
    module, batch = Words(_transformer, dropout=0.3).double(), _sentences()
    torch.manual_seed(2)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = sequential_maml(module, batch, 0.3, 2)
    maml = fastmaml.MAML(module, 0.3, allow_unused=True)
    torch.manual_seed(2)
    by_door(maml, batch, 2, door).backward()
    assert not maml.programs.found_none
    assert relative_error(gradients(module), expected) < 1e-11


def test_tasks_are_made_alike_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmaml.program.draws.Tape.play", None)
    torch.manual_seed(1)
    maml, batch = fastmaml.MAML(Words(_transformer).double(), 0.3), _sentences()
    with pytest.raises(TypeError):  # looking at a tape plays it
        maml.meta_loss(batch, 1)
    monkeypatch.undo()
    maml.meta_loss(batch, 1)
    monkeypatch.setattr("fastmaml.program.draws.Tape.play", None)
    maml.meta_loss(batch, 1).backward()
    maml.clone(tasks=3)(batch.query_x)


def test_mini_batches() -> None:
    torch.manual_seed(1)
    module, batch = Words(_pooled).double(), _sentences()
    maml = fastmaml.MAML(module, 0.3, allow_unused=True)
    maml.meta_loss(batch.split_support(2), 2).backward()
    found = gradients(module)
    module.zero_grad()
    learner = maml.clone(tasks=3)
    for part in (slice(2), slice(2, 4)):
        y = learner(batch.support_x[:, part])
        learner.adapt(per_task(F.cross_entropy, y, batch.support_y[:, part]))
    per_task(F.cross_entropy, learner(batch.query_x), batch.query_y).mean().backward()
    assert not maml.programs.found_none
    assert relative_error(found, gradients(module)) < 1e-11


def test_a_transposed_batch() -> None:
    """Views that were recorded are views of what comes."""
    torch.manual_seed(1)
    module = OfFeatures(lambda m, x: m.layer(x.view(-1).view(len(x), -1).cumsum(1))).double()
    x = torch.randn(FEATURES, 5, dtype=torch.float64).T
    maml = fastmaml.MAML(module, 0.3)
    torch.testing.assert_close(maml.clone()(x), module(x.contiguous()))
    torch.testing.assert_close(maml.clone(tasks=2)(x.expand(2, -1, -1))[1], module(x.contiguous()))
    assert not maml.programs.found_none


class WithConstants(nn.Module):
    """Tensors that it has not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(FEATURES, dtype=torch.float64)
        self.waves = torch.randn(FEATURES, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * self.scale @ self.waves).sin())


def test_tensors_that_are_attributes() -> None:
    torch.manual_seed(1)
    module, batch = WithConstants().double(), _features()
    maml = check_native(module, batch, 0.3)
    module.scale = torch.rand(FEATURES, dtype=torch.float64)
    module.waves.mul_(2)
    for x in batch.query_x:
        torch.testing.assert_close(maml.clone()(x), module(x))
    assert not maml.programs.found_none


class Counting(WithConstants):
    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.5)
        return super().forward(x)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_attributes_that_a_forward_writes_to() -> None:
    torch.manual_seed(1)
    module, x = Counting().double(), _features().query_x[0]
    start = module.scale.clone()
    maml = fastmaml.MAML(module, 0.3)
    maml.clone()(x)
    assert maml.programs.found_none
    torch.testing.assert_close(module.scale, start / 2)


REFUSED: dict[str, tuple[Callable[[OfFeatures, Tensor], Tensor], str]] = {
    "counted": (lambda m, x: m.layer(x * x.nonzero().shape[0]), "nonzero"),
    "read": (lambda m, x: m.layer(x) * x.max().item(), "read off a tensor"),
    "in place": (lambda m, x: m.layer(x.clone().cumsum_(1)), "cumsum_"),
    "with parameters": (lambda m, x: m.layer(x).cumprod(1), "cumprod"),
    "numbers of parameters": (lambda m, x: m.table[m.layer(x).argmax(1)], "argmax"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    f, reason = REFUSED[name]
    with pytest.raises(NotCovered, match=reason):
        capture(OfFeatures(f), _features().query_x[0].float())


@pytest.mark.gpu
@pytest.mark.parametrize(("door", "name"), [(1, "causal"), (3, "pooled")])
def test_on_a_gpu(door: int, name: str) -> None:
    torch.manual_seed(1)
    check_on_a_gpu(Words(SENTENCES[name]), _sentences(), 0.3, door)
