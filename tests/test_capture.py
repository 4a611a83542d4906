"""Modules become the programs they should, or the reason says what stands in the way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmaml
from fastmaml.program.capture import capture
from fastmaml.program.signature import module_signature
from fastmaml.program.substitute import call_with
from fastmaml.program.trace import NotCovered


class Lambda(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Learned(nn.Module):
    """``f`` of something that depends on a parameter."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.f = nn.Parameter(torch.ones(())), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x * self.scale)


def _by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(np.asarray(x.detach())))


def kinds(module: nn.Module, x: Tensor) -> list[str]:
    return [
        op.attrs["function"] if op.kind == "activation" else op.kind
        for op in capture(module, x).ops
    ]


def test_every_spelling_is_one_op() -> None:
    x = torch.randn(2, 4)
    spellings = [F.relu, torch.relu, Tensor.relu, nn.ReLU(), lambda x: (x + 1).relu_() - 0]
    for f in spellings[:-1]:
        assert kinds(Lambda(f), x) == ["relu"]
    assert kinds(Lambda(spellings[-1]), x) == ["scale", "relu", "scale"]


def test_shapes_are_per_example() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(True), nn.Flatten(), nn.Linear(36, 2)
    )
    graph = capture(module, torch.randn(7, 1, 8, 8))
    assert [op.kind for op in graph.ops] == ["conv2d", "activation", "view", "linear"]
    assert graph.values == ((1, 8, 8), (4, 3, 3), (4, 3, 3), (36,), (2,))
    assert graph.parameters == ("0.weight", "0.bias", "3.weight", "3.bias")
    assert dict(graph.ops[0].attrs) == {"stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}


def test_linear_over_leading_axes_needs_no_view() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    graph = capture(module, torch.randn(2, 6, 3))
    assert [op.kind for op in graph.ops] == ["linear", "activation", "linear"]
    assert graph.values[-1] == (6, 2)


def test_linear_on_a_permuted_input_keeps_its_bias() -> None:
    linear = nn.Linear(3, 4)

    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.transpose(1, 2))

    graph = capture(Permuted(), torch.randn(2, 3, 5))
    assert [op.kind for op in graph.ops] == ["permute", "linear"]
    assert graph.parameters == ("linear.weight", "linear.bias")
    assert graph.values[-1] == (5, 4)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: F.leaky_relu(x, 0.2), ["leaky_relu"]),
        (lambda x: F.selu(F.elu(x, 0.5)), ["elu", "selu"]),
        (lambda x: F.gelu(F.gelu(x), approximate="tanh"), ["gelu", "gelu_tanh"]),
        (lambda x: F.relu6(F.logsigmoid(x)), ["log_sigmoid", "hardtanh"]),
        (lambda x: F.hardswish(F.mish(x)), ["mish", "hardswish"]),
        (lambda x: F.hardsigmoid(F.celu(x, 1.5)).abs(), ["elu", "hardsigmoid", "abs"]),
        (lambda x: F.softplus(x.sin().cos().exp()), ["sin", "cos", "exp", "softplus"]),
        (lambda x: x**2 / 2 - 1, ["square", "scale", "scale"]),
        (lambda x: x - 2 * torch.sigmoid(x), ["sigmoid", "scale", "add"]),
        (lambda x: -F.silu(x), ["silu", "scale"]),
        (lambda x: 1 - x * x.sigmoid(), ["sigmoid", "mul", "scale"]),
        (lambda x: x - x.mean(2, keepdim=True), ["mean", "expand", "add"]),
        (lambda x: x.mean(1, keepdim=True).expand_as(x), ["mean", "expand"]),
        (lambda x: x.mean(1), ["mean"]),
        (lambda x: x.sum(-1), ["mean", "scale"]),
        (lambda x: torch.cat([x, x.sin()[:]], 2), ["sin", "cat"]),
        (lambda x: torch.sub(*x.chunk(2, -1)), ["narrow", "narrow", "add"]),
        (lambda x: x[..., 1:-1], ["narrow"]),
        (lambda x: x[:, -1], ["narrow", "view"]),
        (lambda x: x.split([1, 3], -1)[1], ["narrow"]),
        (lambda x: x.sin()[..., :2].mul_(x[..., 2:]), ["sin", "narrow", "narrow", "mul"]),
        (F.glu, ["narrow", "narrow", "sigmoid", "mul"]),
        (lambda x: x.transpose(1, 2).reshape(x.size(0), -1), ["permute", "view"]),
        (lambda x: x.unsqueeze(1).flatten(2), ["view", "view"]),
        (lambda x: F.dropout(x, training=False), []),
    ],
)
def test_the_table(f, expected: list[str]) -> None:
    assert kinds(Lambda(f), torch.randn(2, 3, 4)) == expected


def test_batch_norm_knows_its_buffers() -> None:
    module = nn.BatchNorm1d(3)
    op = capture(module, torch.randn(4, 3)).ops[0]
    assert op.attrs["running"] == ("running_mean", "running_var")
    assert op.attrs["tracking"]
    graph = capture(module.eval(), torch.randn(4, 3))
    assert graph.buffers == ("running_mean", "running_var")
    assert not graph.ops[0].attrs["training"]
    op = capture(nn.BatchNorm1d(3, momentum=None), torch.randn(4, 3)).ops[0]
    assert op.attrs["tracking"]
    op = capture(nn.BatchNorm1d(3, track_running_stats=False), torch.randn(4, 3)).ops[0]
    assert not op.attrs["tracking"]


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (nn.InstanceNorm1d(3, track_running_stats=True), (3, 5), "running statistics of an inst"),
        (Learned(lambda x: torch.tanh(x.view(1, -1, 5))), (3, 5), "examples are side by side"),
        (Learned(lambda x: F.layer_norm(x, x.shape)), (3,), "native_layer_norm .a norm over"),
        (nn.ConvTranspose2d(2, 4, 3, groups=2), (2, 5, 5), r"in groups\) in ConvTranspose2d"),
        (nn.Conv3d(2, 4, 3), (2, 5, 5, 5), r"instead of \[N, C, H, W\]\) in Conv3d"),
        (Learned(lambda x: x.roll(1, 0)), (3,), r"aten.roll \(elements moved between examples\)"),
        (Learned(lambda x: x[:2]), (3,), "examples chosen"),
        (Learned(lambda x: torch.cat([x, x])), (3,), "examples joined"),
        (Learned(lambda x: x - x.mean(0)), (3,), "mean over examples"),
        (Lambda(lambda x: x.relu_()), (3,), "network's input changed in place"),
        (Learned(lambda x: x if x.sum() > 0 else -x), (3,), "sum or mean over examples"),
        (Lambda(lambda x: x if x.sum() > 0 else -x), (3,), "a value that is read off a tensor"),
        (Lambda(lambda x: x * x.nonzero().shape[0]), (3,), "nonzero"),
        (Lambda(lambda x: torch.cat([x, x])), (3,), "whose first axis is not the examples"),
        (Lambda(lambda x: x * float(x.numpy().max())), (3,), r"read off a tensor \(Tensor.numpy"),
        (Learned(lambda x: x + _by_numpy(x)), (3,), r"read off a tensor \(Tensor.__array__"),
        (Learned(lambda x: x * x.detach().tolist()[0][0]), (3,), r"\(Tensor.tolist"),
        (Lambda(lambda x: x * x.shape[0]), (3,), "number of examples"),
        (
            Lambda(lambda x: x.as_strided((len(x), 3), (1, len(x)))),
            (3,),
            "by their place in memory",
        ),
        (Lambda(lambda x: x.flatten()), (3,), "whose first axis is not the examples"),
        (Lambda(lambda x: (x, {1})), (3,), "an output of set, not of tensors"),
        (Learned(lambda x: x @ torch.ones(3, 3000)), (3,), "a weight that is not a parameter"),
        (Lambda(lambda x: x.undefined), (3,), "a forward that fails on a sample"),
    ],
)
def test_refusals_say_why(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        capture(module, torch.randn(4, *shape))


class WithTensors(nn.Module):
    """A layer, and other tensors for ``f`` to use where they should not be."""

    def __init__(self, f: Callable[[WithTensors, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.f = nn.Linear(3, 3), f
        self.exponent = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("weight", torch.randn(3, 3))
        self.register_buffer("bias", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, self.first(x))


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: F.linear(x, m.weight.repeat(2000, 1)),
        lambda m, x: F.conv1d(x[..., None], m.weight[..., None]),
        lambda m, x: F.batch_norm(x, None, None, m.bias, m.bias, training=True),
    ],
)
def test_a_buffer_is_no_weight(f: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(NotCovered, match="a weight that is not a parameter"):
        capture(WithTensors(f), torch.randn(4, 3))


def test_parameters_are_no_running_statistics() -> None:
    class Fixed(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.bias, self.weight, training=self.training)

    for module in (Fixed(3), Fixed(3).eval()):
        with pytest.raises(NotCovered, match="running statistics that are not buffers"):
            capture(module.requires_grad_(False), torch.randn(4, 3))


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


def watched(x: Tensor) -> Tensor:
    x.register_hook(lambda gradient: 2 * gradient)
    return torch.tanh(x)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda m, x: F.linear(x, m.first.weight.detach()), "a parameter without its gradient"),
        (lambda m, x: Cut.apply(x), "an autograd.Function's own"),
        (lambda m, x: watched(x), "a hook"),
        (lambda m, x: x**m.exponent, "pow .an exponent that is a tensor"),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_gradients_are_never_lost(f, reason: str, mode: type) -> None:
    with mode(), pytest.raises(NotCovered, match=reason):
        capture(WithTensors(f), torch.randn(4, 3))


def test_a_refusal_is_not_caught() -> None:
    def f(x: Tensor) -> Tensor:
        try:
            return torch.cumprod(x, 1)
        except Exception:
            return torch.tanh(x)

    with pytest.raises(NotCovered, match=r"aten\.cumprod in Learned"):
        capture(Learned(f), torch.randn(3, 4))


@pytest.mark.parametrize("view", [lambda h: h.view(-1, 2, 2), lambda h: h[:, :2]])
def test_a_view_changed_in_place_is_not_used_again(view) -> None:
    def f(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        view(h).relu_()
        return h

    with pytest.raises(NotCovered, match="changed in place through another"):
        capture(Lambda(f), torch.randn(3, 4))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_s_gradient_mode_does_not_matter(mode: type) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SELU(inplace=True))
    expected = capture(module, torch.randn(4, 2, 5, 5))
    with mode():
        assert capture(module, torch.randn(4, 2, 5, 5)) == expected


def test_capture_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state, x = torch.get_rng_state(), torch.randn(4, 3)
    state = torch.get_rng_state()
    capture(module, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


class TwoNames(nn.Module):
    """One part under two names, as in learn2learn's networks."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.features = nn.Sequential(self.base, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def test_a_module_under_two_names_comes_back_whole() -> None:
    module = TwoNames()
    before = [*module.parameters(), *module.buffers()]
    values = [t.clone() for t in before]
    capture(module, torch.randn(4, 3))
    with pytest.raises(KeyError, match="TwoNames has no parameter or buffer"):
        call_with(module, {"missing": torch.ones(1)}, (torch.randn(4, 3),))
    call_with(module, {"base.0.weight": torch.zeros(3, 3)}, (torch.randn(4, 3),))
    after = [*module.parameters(), *module.buffers()]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after[:4], values[:4], strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_programs_are_not_those_of_autocast(device: str) -> None:
    module = nn.Linear(3, 2)
    outside = module_signature(module)
    torch.set_autocast_enabled(device, True)
    try:
        assert module_signature(module) != outside
    finally:
        torch.set_autocast_enabled(device, False)
    assert module_signature(module) == outside


def test_a_compiled_module_gives_the_same_gradients() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = fastmaml.TaskBatch(
        *(t for _ in range(2) for t in (torch.rand(2, 5, 3), torch.randint(2, (2, 5))))
    )
    gradients = []
    for module in (net, torch.compile(net, backend="eager")):
        net.zero_grad()
        fastmaml.MAML(module, lr=0.1).meta_loss(batch).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other)


class Remembering(nn.Module):
    def __init__(self, remember) -> None:
        super().__init__()
        self.linear, self.remember = nn.Linear(3, 4), remember
        self.calls, self.seen, self.parts = 0, [1], {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.remember(self, y)
        return y


def counted(module: Remembering, y: Tensor) -> None:
    module.calls += 1


@pytest.mark.parametrize(
    ("remember", "name"),
    [
        (lambda m, y: setattr(m, "output", y), "output"),
        (lambda m, y: m.seen.append(y), "seen"),
        (lambda m, y: m.parts.update(y=y), "parts"),
        (counted, "calls"),
    ],
)
def test_what_a_forward_leaves_behind_is_refused(remember, name: str) -> None:
    """A program would leave the outputs of the sample that it was captured with."""
    module = Remembering(remember)
    with pytest.raises(NotCovered, match=f"a forward that sets Remembering.{name}"):
        capture(module, torch.randn(4, 3))
    assert not hasattr(module, "output")
    assert (module.calls, module.seen, module.parts) == (0, [1], {})


def test_a_forward_may_set_what_is_the_same_each_time() -> None:
    module = Remembering(lambda m, y: setattr(m, "shape", y.shape[1:]))
    assert len(capture(module, torch.randn(4, 3)).ops) == 1
