"""The Lightning modules: their losses and gradients, and whole runs of a Trainer."""

from __future__ import annotations

import copy
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.func import functional_call

import fastmaml as l2l
from fastmaml.algorithms import (
    LightningANIL,
    LightningEpisodicModule,
    LightningMAML,
    LightningMetaOptNet,
    LightningPrototypicalNetworks,
)
from fastmaml.utils.lightning import EpisodicBatcher, NoLeaveProgressBar, TrackTestAccuracyCallback

WAYS, SHOTS, QUERIES, STEPS, LR = 3, 2, 4, 2, 0.3
SIZES = {
    f"{part}_{name}": size
    for part in ("train", "test")
    for name, size in {"ways": WAYS, "shots": SHOTS, "queries": QUERIES}.items()
}
INNER = {"adaptation_steps": STEPS, "adaptation_lr": LR}


def features() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()).double()


def net() -> nn.Module:
    return nn.Sequential(*features(), nn.Linear(6, WAYS).double())


def task() -> tuple[Tensor, Tensor]:
    """In blocks by class, the classes in no order."""
    labels = torch.tensor([2, 0, 1]).repeat_interleave(SHOTS + QUERIES)
    return torch.randn(len(labels), 4).double() + labels[:, None], labels


def split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the definition: of each block the first are the support set."""
    support = torch.arange(len(y)) % (SHOTS + QUERIES) < SHOTS
    return x[support], y[support], x[~support], y[~support]


def adapted_loss(module, weights, sx, sy, qx, qy) -> Tensor:
    for _ in range(STEPS):
        loss = F.cross_entropy(functional_call(module, weights, (sx,)), sy)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {n: w - LR * g for (n, w), g in zip(weights.items(), grads, strict=True)}
    return F.cross_entropy(functional_call(module, weights, (qx,)), qy)


def maml_reference(module: LightningMAML, x: Tensor, y: Tensor) -> Tensor:
    inner = module.model.module
    return adapted_loss(inner, dict(inner.named_parameters()), *split(x, y))


def anil_reference(module: LightningANIL, x: Tensor, y: Tensor) -> Tensor:
    head = module.classifier.module
    return adapted_loss(head, dict(head.named_parameters()), *split(module.features(x), y))


def protonet_reference(module: LightningPrototypicalNetworks, x: Tensor, y: Tensor) -> Tensor:
    sx, sy, qx, qy = split(module.features(x), y)
    means = torch.stack([sx[sy == label].mean(0) for label in range(WAYS)])
    return F.cross_entropy(-torch.cdist(qx, means).square(), qy)


def metaoptnet_reference(module: LightningMetaOptNet, x: Tensor, y: Tensor) -> Tensor:
    sx, sy, qx, qy = split(module.features(x), y)
    return F.cross_entropy(l2l.nn.SVClassifier(sx, sy, ways=WAYS, C_reg=0.3)(qx), qy)


MODULES = {
    "maml": (lambda: LightningMAML(net(), **SIZES, **INNER), maml_reference),
    "anil": (
        lambda: LightningANIL(features(), nn.Linear(6, WAYS).double(), **SIZES, **INNER),
        anil_reference,
    ),
    "protonet": (lambda: LightningPrototypicalNetworks(features(), **SIZES), protonet_reference),
    "metaoptnet": (
        lambda: LightningMetaOptNet(features(), svm_C_reg=0.3, **SIZES),
        metaoptnet_reference,
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_loss_and_gradients_of_one_task(kind) -> None:
    build, reference = MODULES[kind]
    module, (x, y) = build(), task()
    expected = reference(module, x, y)
    wanted = torch.autograd.grad(expected, list(module.parameters()), allow_unused=True)
    for batch in ((x, y), (x[None], y[None])):
        loss, accuracy = module.meta_learn(batch, 0, WAYS, SHOTS, QUERIES)
        torch.testing.assert_close(loss, expected)
        assert 0 <= accuracy <= 1
        got = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_a_module_of_ones_own_is_trained_by_adam_with_a_decay() -> None:
    class Mean(LightningEpisodicModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.offset = nn.Parameter(torch.zeros(()))

        def meta_learn(self, batch, batch_idx, ways, shots, queries):
            loss = (batch[0].mean() - self.offset).square()
            return loss, torch.tensor(float(ways))

    module = Mean(lr=0.1, scheduler_step=2, scheduler_decay=0.5, **SIZES)
    assert module.evaluate(task(), 0)[1] == WAYS
    (optimizer,), (scheduler,) = module.configure_optimizers()
    rates = []
    for _ in range(4):
        optimizer.zero_grad()
        module.meta_learn(task(), 0, WAYS, SHOTS, QUERIES)[0].backward()
        optimizer.step()
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    assert rates == [0.1, 0.1, 0.05, 0.05]
    assert module.offset > 0.1  # towards the mean, near 1, at most a rate a step


@pytest.mark.parametrize("kind", MODULES)
def test_a_batch_of_tasks_has_the_mean_of_their_losses(kind) -> None:
    module = MODULES[kind][0]()
    tasks = [task() for _ in range(3)]
    parts = [split(*one) for one in tasks]
    batch = l2l.TaskBatch(*(torch.stack(part) for part in zip(*parts, strict=True)))
    results = [module.meta_learn(one, 0, WAYS, SHOTS, QUERIES) for one in tasks]
    together = module.meta_learn(batch, 0, WAYS, SHOTS, QUERIES)
    for got, each in zip(together, zip(*results, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(each).mean())


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_evaluation_normalises_by_the_task_and_leaves_no_trace(kind, inference) -> None:
    module, (x, y) = MODULES[kind][0](), task()
    expected, _ = copy.deepcopy(module).meta_learn((x, y), 0, WAYS, SHOTS, QUERIES)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()
    with torch.inference_mode(inference):
        loss, _ = module.evaluate((x.clone(), y.clone()), 0)
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    assert not any(part.training for part in module.modules())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_loss_of_ones_own() -> None:
    """Also for MetaOptNet, whose loss learn2learn drops."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 7 + 0 * output.sum()

    for kind in (LightningPrototypicalNetworks, LightningMetaOptNet):
        value, _ = kind(features(), loss, **SIZES).meta_learn(task(), 0, WAYS, SHOTS, QUERIES)
        assert value.item() == 7


def test_options_come_from_a_parser_from_keywords_or_from_the_class() -> None:
    class Slow(LightningMAML):
        adaptation_lr = 0.01

    parser = LightningMetaOptNet.add_model_specific_args(ArgumentParser(add_help=False))
    chosen = parser.parse_args(["--svm_C_reg", "0.5", "--train_ways", "7"])
    module = LightningMetaOptNet(features(), **vars(chosen), max_epochs=3)
    assert module.hparams["svm_C_reg"] == module.classifier.C_reg == 0.5
    assert (module.train_ways, module.test_ways, module.svm_max_iters) == (7, 5, 15)
    assert Slow(net()).model.lr == 0.01
    with pytest.warns(UserWarning, match="data_parallel has no effect"):
        Slow(net(), data_parallel=True)


def test_wrong_sizes() -> None:
    module = LightningMAML(net(), **SIZES)
    with pytest.raises(ValueError, match=r"3 classes of 1 \+ 4 examples, got shape \[18\] and 3"):
        module.meta_learn(task(), 0, WAYS, 1, QUERIES)
    for build in (LightningMAML, lambda *a, **k: LightningANIL(nn.Identity(), *a, **k)):
        with pytest.raises(ValueError, match=r"train_ways and test_ways must be .* 5 and 20"):
            build(net(), test_ways=20)


class Tasks:
    """The same few tasks in turn."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.tasks = [task() for _ in range(4)]
        self.sampled = 0

    def sample(self) -> tuple[Tensor, Tensor]:
        self.sampled += 1
        return self.tasks[(self.sampled - 1) % 4]


def trainer(**options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **(quiet | {"enable_progress_bar": False} | options))


@pytest.mark.filterwarnings("ignore")  # Lightning's, about loaders without workers
def test_a_trainer_takes_the_steps_of_adam() -> None:
    module = LightningMAML(net(), lr=0.01, scheduler_step=1, scheduler_decay=0.5, **SIZES, **INNER)
    twin = copy.deepcopy(module)
    train, validation, test = Tasks(0), Tasks(1), Tasks(2)
    data = EpisodicBatcher(train, validation, test, epoch_length=3)
    run = trainer(
        max_epochs=2,
        num_sanity_val_steps=1,
        enable_progress_bar=True,
        callbacks=[TrackTestAccuracyCallback(), NoLeaveProgressBar()],
    )
    run.fit(module, datamodule=data)
    assert (train.sampled, validation.sampled, test.sampled) == (6, 7, 9)

    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.01 if step < 3 else 0.005
        loss = maml_reference(twin, *train.tasks[step % 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)

    losses = [module.evaluate(one, 0)[0] for one in (*test.tasks[2:4], test.tasks[0])]
    logged = run.callback_metrics["test_loss"].double()
    torch.testing.assert_close(logged, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)
    results = run.test(module, datamodule=data, verbose=False)
    assert set(results[0]) == {"test_loss", "test_accuracy"}


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_on_batches_of_an_episode_sampler() -> None:
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(40) // 4
    sampler = l2l.data.EpisodeSampler((images, labels), ways=5, shots=1, queries=3, tasks=6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    before = model[1].weight.detach().clone()
    module = LightningMAML(model, train_queries=3, test_queries=3)
    run = trainer(max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, datamodule=EpisodicBatcher(sampler, epoch_length=2))
    assert not torch.equal(model[1].weight, before)
    assert sampler.state_dict()["batch"] == 4  # two for training, two for validation


def test_lightning_is_not_imported_unasked() -> None:
    source = "import sys, fastmaml; assert 'pytorch_lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)


def test_without_lightning_the_error_says_what_to_install(monkeypatch) -> None:
    ours = ("fastmaml.algorithms.lightning", "fastmaml.utils.lightning")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(l2l.algorithms, "lightning")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    for use in (lambda: l2l.algorithms.LightningMAML, lambda: import_module(ours[1])):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastmaml\[lightning\]'"):
            use()
    with pytest.raises(AttributeError, match="no attribute 'LightningMAMl'"):
        _ = l2l.algorithms.LightningMAMl
