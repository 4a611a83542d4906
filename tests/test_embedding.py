"""Rows of tables: the op ``embedding``, and forwards that take whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from doors import by_door, check_native, check_on_a_gpu
from networks import episodes, gradients
from rule_cases import Case
from rule_checks import RuleTests
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch
from fastmaml.losses import per_task
from fastmaml.program.capture import capture
from fastmaml.program.ir import freeze
from fastmaml.program.trace import NotCovered
from fastmaml.testing import relative_error, sequential_maml

WORDS, PLACES, WIDTH = 11, 5, 6


class TestEmbedding(RuleTests):
    cases = "embedding"

    def test_numerically(self, case: Case) -> None:
        """Without padding: the gradient of a padded row is not the derivative, as PyTorch's."""
        op = replace(case.op, attrs=freeze({**case.op.attrs, "padding": -1}))
        super().test_numerically(replace(case, op=op))


class Words(nn.Module):
    """Scores of ``f(m, x)`` of whole numbers ``[N, places]``, of shape ``[N, width]``."""

    def __init__(self, f: Callable[[Words, Tensor], Tensor], **kwargs: object) -> None:
        super().__init__()
        self.f = f
        self.words = nn.Embedding(WORDS, WIDTH, **kwargs)
        self.places = nn.Embedding(PLACES + 2, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.table = nn.Parameter(torch.randn(WORDS, WIDTH))
        self.register_buffer("chosen", torch.randint(-WORDS, WORDS, (PLACES,)))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self, x))


def _transformer(m: Words, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    return m.layer(m.words(x) + m.places(places)).mean(1)


def _places_of_one(m: Words, x: Tensor) -> Tensor:
    return (m.words(x) * m.places(torch.arange(x.shape[1])[None])).sum(1)


def _places_of_each(m: Words, x: Tensor) -> Tensor:
    return (m.words(x) * m.places(torch.arange(x.shape[1]).expand(len(x), -1))).sum(1)


def _with_a_word_in_front(m: Words, x: Tensor) -> Tensor:
    first = torch.full((len(x), 1), WORDS - 1, device=x.device)
    return m.recurrent(m.words(torch.cat([first, x], 1)))[0][:, -1]


def _as_numbers(m: Words, x: Tensor) -> Tensor:
    """Rows, and the numbers themselves."""
    return m.words(x[:, 1:]).mean(1) + x[:, :1].to(m.table.dtype) / 3


FORWARDS: dict[str, tuple[Callable[[Words, Tensor], Tensor], dict[str, object]]] = {
    "mean": (lambda m, x: m.words(x).mean(1), {}),
    "padded": (lambda m, x: m.words(x).tanh().mean(1), {"padding_idx": 3}),
    "padded from the end": (lambda m, x: m.words(x).tanh().mean(1), {"padding_idx": -1}),
    "one number": (lambda m, x: m.words(x[:, 2]), {}),
    "turned numbers": (
        lambda m, x: m.words(x[:, 1:].view(-1, 2, 2).transpose(1, 2))[:, 1].tanh().mean(1), {},
    ),
    "recurrent": (lambda m, x: m.recurrent(m.words(x))[1][-1], {}),
    "transformer": (_transformer, {}),
    "places of one": (_places_of_one, {}),
    "places of each": (_places_of_each, {}),
    "a word in front": (_with_a_word_in_front, {}),
    "as numbers": (_as_numbers, {}),
    "parameters by numbers": (
        lambda m, x: m.table[x - WORDS].tanh().mean(1) * m.table[x[:, 0]], {},
    ),
    "one-hot": (lambda m, x: (F.one_hot(x, WORDS).to(m.table.dtype) @ m.table).tanh().mean(1), {}),
    "arithmetic": (lambda m, x: m.words((x + 1) % WORDS).mean(1), {}),
    "a table that multiplies": (
        lambda m, x: F.linear(m.words(x).mean(1), m.words.weight)[:, :WIDTH], {},
    ),
    "chosen by a buffer": (lambda m, x: (m.words(x) * m.table[m.chosen]).sum(1), {}),
    "chosen by constants": (
        lambda m, x: (m.words(x) * m.table[torch.tensor([[0, 3, 3, -1, 1]])]).sum(1), {},
    ),
}  # fmt: skip


def _episodes(dtype: torch.dtype = torch.int64) -> TaskBatch:
    g = torch.Generator().manual_seed(3)
    x = [torch.randint(WORDS, (3, n, PLACES), generator=g).to(dtype) for n in (4, 6)]
    y = [torch.randint(3, (3, n), generator=g) for n in (4, 6)]
    return TaskBatch(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("name", FORWARDS)
def test_native_forwards(name: str) -> None:
    torch.manual_seed(1)
    f, kwargs = FORWARDS[name]
    check_native(Words(f, **kwargs).double(), _episodes(), 0.3).adapted(_episodes())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_images_of_bytes(dtype: torch.dtype) -> None:
    """As many a data set gives them; in float32, in which PyTorch divides them."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(PLACES, 4), nn.Tanh(), nn.Linear(4, 3))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x / 255)

    module, tasks = Scaled(), _episodes(dtype)
    _, expected = sequential_maml(module, tasks, 0.3, 2)
    for door in (1, 2, 3):
        module.zero_grad()
        maml = fastmaml.MAML(module, 0.3)
        by_door(maml, tasks, 2, door).backward()
        assert not maml.programs.found_none
        assert relative_error(gradients(module), expected) < 1e-5


def test_minibatches_of_words() -> None:
    torch.manual_seed(1)
    module, (x, y, *query) = Words(FORWARDS["recurrent"][0]).double(), _episodes()
    halves = [t.unflatten(1, (2, 2)).transpose(0, 1) for t in (x, y)]
    tasks, maml = TaskBatch(*halves, *query), fastmaml.MAML(module, 0.3, allow_unused=True)
    learner = maml.clone(tasks=3)
    for step in range(3):
        support_x, support_y = tasks.support(step)
        learner.adapt(per_task(F.cross_entropy, learner(support_x), support_y))
    per_task(F.cross_entropy, learner(tasks.query_x), tasks.query_y).mean().backward()
    expected = gradients(module)
    module.zero_grad()
    maml.meta_loss(tasks, steps=3).backward()
    assert relative_error(gradients(module), expected) < 1e-11


def test_a_module_of_another_dtype_since() -> None:
    """The input's dtype does not tell."""
    torch.manual_seed(1)
    module = Words(FORWARDS["mean"][0])
    maml = fastmaml.MAML(module, 0.3)
    maml.meta_loss(_episodes(), 1).backward()
    module.double()
    check_native(module, _episodes(), 0.3)
    assert maml.meta_loss(_episodes(), 1).dtype == torch.float64


@pytest.mark.parametrize("number", [-1, WORDS])
@pytest.mark.parametrize("door", [1, 2, 3])
def test_a_number_that_is_no_row(number: int, door: int) -> None:
    module = Words(FORWARDS["one number"][0])
    maml, tasks = fastmaml.MAML(module, 0.3, allow_unused=True), _episodes()
    tasks.query_x[1, 2, 0] = number  # is not looked at
    by_door(maml, tasks, 1, door)
    tasks.query_x[1, 2, 2] = number
    with pytest.raises(IndexError, match=rf"x must hold numbers from 0 to 10 .* got {number}"):
        by_door(maml, tasks, 1, door)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("door", "name"), [(1, "a word in front"), (2, "recurrent"), (3, "transformer")]
)
def test_words_on_a_gpu(door: int, name: str) -> None:
    torch.manual_seed(1)
    check_on_a_gpu(Words(FORWARDS[name][0]), _episodes(), 0.3, door)


REFUSED: dict[str, tuple[Callable[[Words, Tensor], Tensor], dict[str, object], str]] = {
    "sorted": (lambda m, x: m.words(x).sort(1)[0].mean(1), {}, "sort"),
    "largest norm": (lambda m, x: m.words(x).mean(1), {"max_norm": 1.0}, "embedding_renorm"),
    "by frequency": (lambda m, x: m.words(x).mean(1), {"scale_grad_by_freq": True}, "scaled"),
    "sparse": (lambda m, x: m.words(x).mean(1), {"sparse": True}, "sparse"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    f, kwargs, reason = REFUSED[name]
    with pytest.raises(NotCovered, match=reason):
        capture(Words(f, **kwargs), _episodes().query_x[0])


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_what_is_refused_runs() -> None:
    torch.manual_seed(1)
    module = Words(REFUSED["sorted"][0]).double()
    _, expected = sequential_maml(module, _episodes(), 0.3, 2)
    fastmaml.MAML(module, 0.3).meta_loss(_episodes(), 2).backward()
    assert relative_error(gradients(module), expected) < 1e-11


def test_floats_are_no_numbers_of_rows() -> None:
    with pytest.raises(NotCovered):
        capture(Words(lambda m, x: m.words(x).mean(1)), episodes((PLACES,)).query_x[0])
