"""Modules under learn2learn's names: what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

import fastmaml as l2l
from fastmaml.nn.metaoptnet import solve_bounded
from fastmaml.nn.protonet import compute_prototypes


def test_small_modules() -> None:
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(l2l.nn.Lambda(lambda x, k: k * x)(x, k=3), 3 * x)
    assert l2l.nn.Flatten()(x).shape == (2, 12)
    torch.testing.assert_close(l2l.nn.Scale((3, 4), alpha=0.5)(x), x / 2)
    assert l2l.nn.Scale(3).alpha.shape == (3,)
    assert l2l.nn.Scale().alpha.shape == (1,)


def test_freezing_and_thawing() -> None:
    model = nn.Linear(2, 2)
    clone = l2l.clone_module(model)
    for frozen in (l2l.nn.freeze(model), l2l.nn.freeze(clone)):
        assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in l2l.nn.unfreeze(model).parameters())


def random_kronecker(n: int, m: int, **kwargs) -> l2l.nn.KroneckerLinear:
    layer = l2l.nn.KroneckerLinear(n, m, **kwargs).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


@pytest.mark.parametrize("psd", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_kronecker_linear_is_its_product(psd, bias) -> None:
    layer = random_kronecker(2, 3, bias=bias, psd=psd)
    left, right = layer.left, layer.right
    if psd:
        left, right = left.T @ left, right.T @ right
    full = torch.kron(right.T.contiguous(), left)
    x = torch.randn(6).double()
    offset = layer.bias.T.flatten() if bias else 0
    torch.testing.assert_close(layer(x), full @ x + offset)
    matrices = torch.randn(4, 2, 3).double()
    expected = torch.stack([(full @ a.T.flatten() + offset).view(3, 2).T for a in matrices])
    torch.testing.assert_close(layer(matrices), expected)
    with pytest.raises(ValueError, match=r"x must have shape \[6\] or \[..., 2, 3\], got \[4, 6\]"):
        layer(torch.zeros(4, 6).double())


def test_kronecker_products_are_added_like_addmm() -> None:
    a, b, x = (torch.randn(n, m).double() for n, m in ((4, 2), (3, 5), (2, 3)))
    offset = torch.randn(4, 5).double()
    vector = torch.kron(b.T.contiguous(), a) @ x.T.flatten()
    expected = 2 * vector.view(5, 4).T + 3 * offset
    torch.testing.assert_close(
        l2l.nn.kronecker_addmm(a, b, x, offset, alpha=2.0, beta=3.0), expected
    )


def test_kronecker_cells_are_the_usual_ones() -> None:
    n, m = 2, 3
    x, h, c = (torch.randn(n, m).double() for _ in range(3))
    cell = l2l.nn.KroneckerRNN(n, m).double()
    y, hidden = cell(x, h)
    torch.testing.assert_close(hidden, torch.tanh(x + h))  # maps start as the identity
    torch.testing.assert_close(y, hidden)
    lstm = l2l.nn.KroneckerLSTM(n, m).double()
    with torch.no_grad():
        for p in lstm.parameters():
            p += 0.3 * torch.randn_like(p)
    gates = {g: getattr(lstm, f"W_i{g}")(x) + getattr(lstm, f"W_h{g}")(h) for g in "ifgo"}
    cell_state = gates["f"].sigmoid() * c + gates["i"].sigmoid() * gates["g"].tanh()
    expected = gates["o"].sigmoid() * cell_state.tanh()
    y, (new_h, new_c) = lstm(x, (h, c))
    torch.testing.assert_close(new_c, cell_state)
    torch.testing.assert_close(y, expected)
    assert y is new_h


def test_prototypes_are_in_the_order_of_labels() -> None:
    support = torch.tensor([[1.0, 2.0], [5.0, 6.0], [3.0, 6.0]])
    prototypes = compute_prototypes(support, torch.tensor([4, 1, 4]))
    assert prototypes.tolist() == [[5.0, 6.0], [2.0, 4.0]]


def test_prototypes_are_class_means() -> None:
    support, labels = torch.randn(6, 3), torch.tensor([7, 2, 7, 2, 7, 9])
    queries = torch.randn(4, 3)
    means = torch.stack([support[labels == c].mean(0) for c in (2, 7, 9)])
    classifier = l2l.nn.PrototypicalClassifier(support, labels)
    expected = -torch.cdist(queries, means).square()
    torch.testing.assert_close(classifier(queries), expected)
    cosine = l2l.nn.PrototypicalClassifier(support, labels, distance="cosine")
    torch.testing.assert_close(cosine(queries), F.cosine_similarity(queries[:, None], means, dim=2))
    own = l2l.nn.PrototypicalClassifier(distance=lambda p, q: torch.cdist(q, p, p=1))
    own.fit_(support, labels)
    torch.testing.assert_close(own(queries), -torch.cdist(queries, means, p=1))
    with pytest.raises(RuntimeError, match="no prototypes yet"):
        l2l.nn.PrototypicalClassifier()(queries)
    with pytest.raises(ValueError, match="distance must be 'euclidean', 'cosine' or a function"):
        l2l.nn.PrototypicalClassifier(distance="manhattan")


def test_quadratic_programs_are_solved() -> None:
    """The optimality conditions: no feasible direction goes down."""
    for seed in range(5):
        torch.manual_seed(seed)
        n, root = 6, torch.randn(6, 6).double()
        q, p = root @ root.T + torch.eye(n), torch.randn(n).double()
        h, a = torch.rand(n).double() + 0.1, torch.ones(1, n).double()
        z = solve_bounded(q, p, h, a, 30)
        assert (z <= h + 1e-6).all()
        assert (a @ z).abs().max() < 1e-8
        slope = -(q @ z + p)
        free = z < h - 1e-6
        nu = slope[free].mean()
        torch.testing.assert_close(slope[free], nu.expand(int(free.sum())), atol=1e-6, rtol=0)
        assert (slope[~free] >= nu - 1e-6).all()


def test_support_vector_classifier_separates_and_is_differentiable() -> None:
    means = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.0, 0]]).double()
    labels = torch.arange(3).repeat_interleave(4)
    support = means[labels] + 0.3 * torch.randn(12, 4).double()
    queries = means[labels] + 0.3 * torch.randn(12, 4).double()
    for normalize in (False, True):
        classifier = l2l.nn.SVClassifier(support, labels, normalize=normalize)
        assert (classifier(queries).argmax(1) == labels).all()

    def scores(x: torch.Tensor) -> torch.Tensor:
        return l2l.nn.SVClassifier(x, labels, max_iters=40)(queries[:2])

    assert gradcheck(scores, (support.clone().requires_grad_(),), atol=1e-5)
    with pytest.raises(RuntimeError, match="no classifier yet"):
        l2l.nn.SVClassifier()(queries)


def test_layers_are_substituted_and_restored() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    meta = l2l.nn.MetaModule(
        model,
        {
            nn.Linear: lambda layer: l2l.nn.ParameterTransform(
                layer, lambda p: l2l.nn.Scale(alpha=2.0)
            )
        },
    )
    x = torch.randn(4, 3)
    scaled = F.relu(F.linear(x, 2 * before["0.weight"], 2 * before["0.bias"]))
    expected = F.linear(scaled, 2 * before["2.0.weight"], 2 * before["2.0.bias"])
    torch.testing.assert_close(meta(x), expected)
    assert len(list(meta.meta_parameters())) == 4
    assert all(p.requires_grad for p in meta.meta_parameters())
    assert [n for n, p in meta.named_parameters() if p.requires_grad and "alpha" not in n] == []
    meta(x).sum().backward()
    assert all(p.grad is not None for p in meta.meta_parameters())
    restored = meta.module()
    assert restored is model
    assert isinstance(restored[0], nn.Linear)
    assert isinstance(restored[2][0], nn.Linear)
    hidden = F.relu(F.linear(x, before["0.weight"], before["0.bias"]))
    torch.testing.assert_close(model(x), F.linear(hidden, before["2.0.weight"], before["2.0.bias"]))


def test_a_copy_of_a_frozen_layer_is_not_frozen() -> None:
    substitutions = {nn.Linear: lambda layer: nn.Sequential(layer, copy.deepcopy(layer))}
    meta = l2l.nn.MetaModule(nn.Sequential(nn.Linear(3, 3)), substitutions)
    assert [p.requires_grad for p in meta.parameters()] == [False, False, True, True]


def test_parameters_of_inner_modules_are_transformed_too() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2, bias=False)))
    transforms = {(2, 3): l2l.nn.Scale(alpha=3.0), (2, 2): l2l.nn.Scale(alpha=-1.0)}
    wrapped = l2l.nn.ParameterTransform(model, lambda p: transforms.get(tuple(p.shape)))
    x = torch.randn(4, 3)
    expected = F.linear(F.linear(x, 3 * model[0].weight, model[0].bias), -model[1][0].weight)
    torch.testing.assert_close(wrapped(x), expected)
    assert len(list(wrapped.meta_parameters())) == 2


def test_a_part_under_two_names_keeps_its_parameters_when_transformed() -> None:
    part = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": part, "b": nn.Sequential(part)})
    model.forward = lambda x: model["b"](x)
    before = dict(part.named_parameters())
    wrapped = l2l.nn.ParameterTransform(model, lambda p: l2l.nn.Scale(alpha=2.0))
    x = torch.randn(4, 3)
    for _ in range(2):
        torch.testing.assert_close(wrapped(x), 2 * part(x))
        assert all(p is before[name] for name, p in part.named_parameters())


def test_the_state_of_a_transform_has_learn2learns_names() -> None:
    layer = l2l.nn.ParameterTransform(nn.Linear(3, 2), lambda p: l2l.nn.Scale())
    assert list(layer.state_dict()) == [
        "module.weight",
        "module.bias",
        "parameter_transforms.weight.alpha",
        "parameter_transforms.bias.alpha",
    ]
