"""CUDA graphs of meta-steps: what is captured, what is copied, what goes; with a pretended capture.

On a GPU the same meta-steps are captured in earnest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context

import pytest
import torch
from pretended_capture import Pretended
from torch import Tensor, nn

import fastmaml
from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.graphs import Graphs
from fastmaml.backends.precision import precision
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.updates import FusedUpdate, UpdateRule

T, N = 3, 4
MODULE = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
LAYOUT = ParameterLayout(MODULE, lambda name, p: not name.startswith("1"))
EXECUTOR = ReferenceExecutor(capture(MODULE, torch.randn(4, 3).double()), LAYOUT)


def call(examples: int = N, **changes: object) -> MetaStep:
    x, qx = torch.randn(T, examples, 3).double(), torch.randn(T, 6, 3).double()
    first = MetaStep(
        theta=torch.randn(LAYOUT.theta_size).double(),
        phi=LAYOUT.pack(adapted=False).detach() + torch.rand(LAYOUT.shared_size).double(),
        buffers=[b.double() for b in MODULE.buffers()][:2],
        support_x=x,
        support_y=torch.randint(2, (T, examples)),
        query_x=qx,
        query_y=torch.randint(2, (T, 6)),
        steps=2,
        loss="cross_entropy",
        rate=0.1,
        rates=1 + torch.rand(LAYOUT.theta_size).double(),
        shared_gradient=True,
        rates_gradient=True,
    )
    return replace(first, **changes)


def alike(found: MetaStepResult, expected: MetaStepResult, gradient: bool = True) -> bool:
    names = ["losses", "theta_grad", "phi_grad", "rates_grad", "statistics"]
    names = names if gradient else ["losses", "adapted", "predictions", "statistics"]
    return all(torch.equal(getattr(found, n), getattr(expected, n)) for n in names)


def test_the_second_call_of_a_form_is_captured_and_later_ones_replayed():
    pretended = Pretended()
    graphs = Graphs(pretended)
    expected_counts = [(0, 0), (1, 1), (1, 2), (1, 3)]
    results = []
    for counts in expected_counts:
        one = call()
        results.append((graphs(one, EXECUTOR.meta_step), EXECUTOR.meta_step(one)))
        assert (pretended.captures, pretended.replays) == counts
    assert all(alike(*pair) for pair in results)  # each outlives the calls that follow


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 3},
        {
            "loss": "mse",
            "support_y": torch.randn(T, N, 2).double(),
            "query_y": torch.randn(T, 6, 2).double(),
        },
        {"first_order": True},
        {"rates": None, "rates_gradient": False},
        {"shared_gradient": False},
        {"gradient": False},
        {"examples": 5},
    ],
)
def test_another_form_gets_another_graph(changes):
    pretended = Pretended()
    graphs = Graphs(pretended)
    for _ in range(3):
        graphs(call(), EXECUTOR.meta_step)
    for i in range(3):
        one = call(**changes)
        found, expected = graphs(one, EXECUTOR.meta_step), EXECUTOR.meta_step(one)
        assert torch.equal(found.losses, expected.losses)
        if one.gradient:
            assert torch.equal(found.theta_grad, expected.theta_grad)
        else:
            assert alike(found, expected, gradient=False)
        assert pretended.captures == (1 if i == 0 else 2)
    assert len(graphs) == 2


def test_calls_of_another_kind_get_another_graph():
    @dataclass
    class Doubled:
        x: Tensor

    @dataclass
    class Halved:
        x: Tensor

    graphs, x = Graphs(Pretended()), torch.ones(3)
    for _ in range(3):
        assert graphs(Doubled(x), lambda call: [2 * call.x])[0][0] == 2
        assert graphs(Halved(x), lambda call: [call.x / 2])[0][0] == 0.5
    assert len(graphs) == 2


@pytest.mark.parametrize("rates", [True, False])
def test_a_changed_rate_is_picked_up(rates):
    pretended = Pretended()
    graphs = Graphs(pretended)
    without = {} if rates else {"rates": None, "rates_gradient": False}
    for rate in (0.1, 0.1, 0.03, 0.7):
        one = call(rate=rate, **without)
        found, expected = graphs(one, EXECUTOR.meta_step), EXECUTOR.meta_step(one)
        assert torch.equal(found.theta_grad, expected.theta_grad)
        assert not rates or torch.equal(found.rates_grad, expected.rates_grad)
    assert (pretended.captures, pretended.replays) == (1, 3)


def test_precision_and_stream_are_part_of_the_form():
    pretended = Pretended()
    graphs = Graphs(pretended)
    for on, name in ((0, "ieee"), (0, "tf32"), (1, "ieee")):
        pretended.on = on
        with precision(name):
            for _ in range(2):
                graphs(call(), EXECUTOR.meta_step)
    assert pretended.captures == len(graphs) == 3


def test_graphs_of_inference_mode_serve_there_alone():
    pretended = Pretended()
    graphs, one = Graphs(pretended), call(gradient=False)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            for _ in range(3):
                found = graphs(one, EXECUTOR.meta_step)
        assert alike(found, EXECUTOR.meta_step(one), gradient=False)
    assert pretended.captures == 2


def test_inner_optimizers():
    graphs = Graphs(Pretended())
    for _ in range(3):
        tables = [torch.rand(1, 1).double() for _ in range(9)]
        update = FusedUpdate(UpdateRule(momentum=True), tables)
        wanted = [i < 4 for i in range(9)]
        one = call(rates=None, rates_gradient=False, update=update, coefficients_gradient=wanted)
        found, expected = graphs(one, EXECUTOR.meta_step), EXECUTOR.meta_step(one)
        assert torch.equal(found.theta_grad, expected.theta_grad)
        for a, b in zip(found.coefficient_grads, expected.coefficient_grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_graphs_called_longest_ago_go_first():
    graphs = Graphs(Pretended(nbytes=10_000), memory_budget=30_000)
    for examples in (2, 3):
        for _ in range(2):
            graphs(call(examples), EXECUTOR.meta_step)
    graphs(call(2), EXECUTOR.meta_step)
    assert len(graphs) == 2
    for _ in range(2):
        graphs(call(4), EXECUTOR.meta_step)
    assert len(graphs) == 2
    assert graphs.nbytes <= 30_000
    pretended = graphs._capture
    before = pretended.replays
    graphs(call(2), EXECUTOR.meta_step)
    assert pretended.replays == before + 1
    graphs(call(3), EXECUTOR.meta_step)  # the one that had to go
    assert pretended.replays == before + 1


def test_the_latest_graph_stays_whatever_its_size():
    graphs = Graphs(Pretended(nbytes=10**9), memory_budget=1)
    for _ in range(3):
        graphs(call(), EXECUTOR.meta_step)
    assert len(graphs) == 1


def test_what_cannot_be_captured_runs_as_it_is():
    pretended = Pretended(fail=["operation not permitted when stream is capturing\nmore"])
    graphs = Graphs(pretended)
    graphs(call(), EXECUTOR.meta_step)
    one = call()
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing"):
        assert alike(graphs(one, EXECUTOR.meta_step), EXECUTOR.meta_step(one))
    for _ in range(3):
        assert alike(graphs(one, EXECUTOR.meta_step), EXECUTOR.meta_step(one))
    assert pretended.captures == 0
    assert "a form is not: operation not permitted" in graphs.describe()


def test_inside_another_graph_nothing_is_captured():
    pretended = Pretended(busy="it is part of another graph")
    graphs = Graphs(pretended)
    for _ in range(3):
        graphs(call(), EXECUTOR.meta_step)
    assert len(graphs) == 0


def test_switched_off(monkeypatch):
    monkeypatch.setenv("FASTMAML_GRAPHS", "0")
    graphs = Graphs(Pretended())
    for _ in range(3):
        graphs(call(), EXECUTOR.meta_step)
    assert len(graphs) == 0
    assert graphs.describe() == "off, FASTMAML_GRAPHS=0"
    monkeypatch.setenv("FASTMAML_GRAPHS", "maybe")
    with pytest.raises(ValueError, match="FASTMAML_GRAPHS must be 0 or 1, got 'maybe'"):
        graphs.describe()


def test_a_form_is_prepared_before_its_first_call():
    """Such that what this will launch is seen, but on no data."""
    devices, within = [], []

    @contextmanager
    def prepared() -> Iterator[None]:
        within.append(len(devices))
        yield
        within.append(len(devices))

    def run(call: MetaStep) -> MetaStepResult:
        devices.append(call.theta.device.type)
        assert call.theta.shape == (LAYOUT.theta_size,)
        return EXECUTOR.meta_step(call)

    graphs = Graphs(Pretended(), prepared=prepared)
    for steps in (1, 2):
        for _ in range(4):
            one = call(steps=steps)
            assert alike(graphs(one, run), EXECUTOR.meta_step(one))
    first = ["meta", *["cpu"] * 5]  # as it is, captured, thrice replayed
    assert devices == 2 * first
    assert within == [0, 1, 6, 7]


def test_what_fails_in_preparation_fails_again_or_does_not():
    @contextmanager
    def prepared() -> Iterator[None]:
        yield
        raise ValueError("no compiler")

    graphs, one = Graphs(Pretended(), prepared=prepared), call()
    assert alike(graphs(one, EXECUTOR.meta_step), EXECUTOR.meta_step(one))


def test_an_error_in_the_step_itself_is_raised():
    def broken(call: MetaStep) -> MetaStepResult:
        raise ValueError("no such step")

    graphs = Graphs(Pretended())
    for _ in range(3):
        with pytest.raises(ValueError, match="no such step"):
            graphs(call(), broken)


def test_explain_says_what_is_captured(capsys):
    pytest.importorskip("triton", minversion="3.4")
    from fastmaml.backends.gpu import GpuExecutor

    maml = fastmaml.MAML(nn.Linear(3, 2), lr=0.1)
    x = torch.randn(T, N, 3)
    program = maml.programs.find(maml.layout(), x)
    program.executor = GpuExecutor(program.graph, program.layout, torch.float32)
    plan = fastmaml.explain(maml, x[0])
    assert plan.meta_steps == (
        "one kernel where a task fits into one block; CUDA graphs: 0 captured, 0.0 MiB"
    )
    assert plan.meta_steps in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("device", [0, 1])
def test_on_a_gpu(device: int):
    if device >= torch.cuda.device_count():
        pytest.skip("needs another CUDA device")
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).cuda(device)
    maml = fastmaml.MAML(module, lr=0.1)
    labels = torch.arange(5, device=f"cuda:{device}").repeat(4, 1)

    def gradients(x: Tensor) -> list[Tensor]:
        batch = fastmaml.TaskBatch(x[:, :5], labels, x[:, 5:], labels)
        maml.zero_grad()
        maml.meta_loss(batch, steps=2).backward()
        return [p.grad.clone() for p in maml.parameters()]

    batches = [torch.randn(4, 10, 1, 9, 9, device=labels.device) for _ in range(4)]
    with precision("ieee"):
        graphed = [gradients(x) for x in batches]
        program = maml.programs.find(maml.layout(), batches[0])
        assert len(program.executor.graphs) == 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTMAML_GRAPHS", "0")
            plain = [gradients(x) for x in batches]
    for a, b in zip(graphed, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_a_capture_that_breaks_off_on_a_gpu():
    """In a process of its own, which is all that suffers if it is not mended."""
    process = get_context("spawn").Process(target=breaking_off)
    process.start()
    process.join()
    assert process.exitcode == 0


def breaking_off() -> None:
    """Others come about all the same; random numbers and memory are as ever."""
    waits = True

    def run(call: MetaStep) -> MetaStepResult:
        if waits:
            torch.cuda.synchronize()
        return EXECUTOR.meta_step(call)

    graphs = Graphs()
    graphs(on_a_gpu(call(steps=1)), run)
    with pytest.warns(UserWarning, match="could not be captured"):
        graphs(on_a_gpu(call(steps=1)), run)
    torch.randn(3, device="cuda")
    torch.cuda.empty_cache()
    waits, before = False, torch.cuda.memory_reserved()
    for _ in range(3):
        given = call(steps=2)
        found = graphs(on_a_gpu(given), run)
        torch.testing.assert_close(found.theta_grad.cpu(), EXECUTOR.meta_step(given).theta_grad)
    assert len(graphs) == 1
    del graphs, found
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def on_a_gpu(given: MetaStep) -> MetaStep:
    buffers = [b.cuda() for b in given.buffers]
    moved = {n: v.cuda() for n, v in vars(given).items() if isinstance(v, Tensor)}
    return replace(given, buffers=buffers, **moved)
