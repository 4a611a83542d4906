"""learn2learn's public names, name by name: they are there, take the same arguments, are tested."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmaml

UTILITIES = """
    accuracy(preds, targets)
    clone_distribution(dist)
    clone_module(module, memo=None)
    clone_named_parameters(param_dict)
    clone_parameters(param_list)
    detach_distribution(dist)
    detach_module(module, keep_requires_grad=False)
    flatten_config(args, prefix=None)
    magic_box(x)
    update_module(module, updates=None, memo=None)
    warn_once(message, severity=None)
"""
LEARN2LEARN = {  # version 0.2.1
    "": UTILITIES,
    ".utils": UTILITIES,
    ".utils.lightning": """
        EpisodicBatcher(train_tasks, validation_tasks=None, test_tasks=None, epoch_length=1)
        NoLeaveProgressBar()
        TrackTestAccuracyCallback()
    """,
    ".algorithms": """
        MAML(model, lr, first_order=False, allow_unused=None, allow_nograd=False)
        MetaSGD(model, lr=1.0, first_order=False, lrs=None)
        GBML(module, transform, lr=1.0, adapt_transform=False, first_order=False,
             allow_unused=False, allow_nograd=False)
        maml_update(model, lr, grads=None)
        meta_sgd_update(model, lrs=None, grads=None)
        LightningEpisodicModule()
        LightningMAML(model, loss=None)
        LightningANIL(features, classifier, loss=None)
        LightningPrototypicalNetworks(features, loss=None)
        LightningMetaOptNet(features, loss=None)
    """,
    ".algorithms.base_learner": "BaseLearner()",
    ".data": """
        DataDescription(index)
        MetaDataset(dataset, labels_to_indices=None, indices_to_labels=None)
        FilteredMetaDataset(dataset, labels)
        UnionMetaDataset(datasets)
        Taskset(dataset, task_transforms=None, num_tasks=-1, task_collate=None)
        TaskDataset()
        InfiniteIterator(dataloader)
        OnDeviceDataset(dataset, device=None, transform=None)
        partition_task(data, labels, shots=1)
    """,
    ".data.samplers": "TasksetSampler(taskset, shuffle=True)",
    ".data.transforms": """
        TaskTransform(dataset)
        LoadData(dataset)
        FilterLabels(dataset, labels)
        ConsecutiveLabels(dataset)
        RemapLabels(dataset, shuffle=True)
        NWays(dataset, n=2)
        KShots(dataset, k=1, replacement=False)
        FusedNWaysKShots(dataset, n=2, k=1, replacement=False, filter_labels=None)
    """,
    ".data.utils": """
        download_file(source, destination, size=None)
        download_file_from_google_drive(id, destination)
    """,
    ".gym": """
        AsyncVectorEnv(env_fns, env=None)
        MetaEnv(task=None)
    """,
    ".gym.envs": "Particles2DEnv(task=None)",
    ".nn": """
        Flatten()
        KroneckerLSTM(n, m, bias=True, sigma=None)
        KroneckerLinear(n, m, bias=True, psd=False, device=None)
        KroneckerRNN(n, m, bias=True, sigma=None)
        Lambda(lmb)
        MetaModule(module, substitutions, freeze_module=True)
        ParameterTransform(module, transform)
        PrototypicalClassifier(support=None, labels=None, distance='euclidean', normalize=False)
        SVClassifier(support=None, labels=None, ways=None, normalize=False, C_reg=0.1, max_iters=15)
        Scale(shape=None, alpha=1.0)
        freeze(module)
        kronecker_addmm(mat1, mat2, mat3, bias=None, alpha=1.0, beta=1.0)
        unfreeze(module)
    """,
    ".nn.protonet": "compute_prototypes(support, labels)",
    ".optim": """
        DifferentiableSGD(lr)
        KroneckerTransform(kronecker_cls, bias=False, psd=True)
        LearnableOptimizer(model, transform, lr=1.0)
        MetaCurvatureTransform(param, lr=1.0)
        ModuleTransform(module_cls)
        ParameterUpdate(parameters, transform)
        ReshapedTransform(transform, shape)
        TransformDictionary(dictionary)
    """,
    ".vision.benchmarks": """
        list_tasksets()
        get_tasksets(name, train_ways=5, train_samples=10, test_ways=5, test_samples=10,
                     num_tasks=-1, root='~/data', device=None)
        omniglot_tasksets(train_ways, train_samples, test_ways, test_samples, root, device=None)
        mini_imagenet_tasksets(train_ways=5, train_samples=10, test_ways=5, test_samples=10,
                               root='~/data', data_augmentation=None, device=None)
        tiered_imagenet_tasksets(train_ways=5, train_samples=10, test_ways=5, test_samples=10,
                                 root='~/data', data_augmentation=None, device=None)
        fc100_tasksets(train_ways=5, train_samples=10, test_ways=5, test_samples=10,
                       root='~/data', device=None)
        cifarfs_tasksets(train_ways=5, train_samples=10, test_ways=5, test_samples=10,
                         root='~/data', device=None)
    """,
    ".vision.datasets": """
        CIFARFS(root, mode='train', transform=None, target_transform=None, download=False)
        CUBirds200(root, mode='all', transform=None, target_transform=None, download=False,
                   include_imagenet_duplicates=False, bounding_box_crop=False)
        DescribableTextures(root, mode='all', transform=None, target_transform=None, download=False)
        FC100(root, mode='train', transform=None, target_transform=None, download=False)
        FGVCAircraft(root, mode='all', transform=None, target_transform=None, download=False,
                     bounding_box_crop=False)
        FGVCFungi(root, mode='all', transform=None, target_transform=None, download=False)
        FullOmniglot(root, transform=None, target_transform=None, download=False)
        MiniImagenet(root, mode='train', transform=None, target_transform=None, download=False)
        Quickdraw(root, mode='all', transform=None, target_transform=None, download=False)
        TieredImagenet(root, mode='train', transform=None, target_transform=None, download=False)
        VGGFlower102(root, mode='all', transform=None, target_transform=None, download=False)
    """,
    ".vision.models": """
        CNN4(output_size, hidden_size=64, layers=4, channels=3, max_pool=True, embedding_size=None)
        CNN4Backbone(hidden_size=64, layers=4, channels=3, max_pool=True, max_pool_factor=None)
        ConvBase(hidden=64, channels=1, max_pool=False, layers=4, max_pool_factor=1.0)
        ConvBlock(in_channels, out_channels, kernel_size, max_pool=True, max_pool_factor=1.0)
        MiniImagenetCNN(output_size, hidden_size=64, layers=4, channels=3, max_pool=True,
                        embedding_size=None)
        OmniglotCNN(output_size=5, hidden_size=64, layers=4)
        OmniglotFC(input_size, output_size, sizes=None)
        ResNet12(output_size, hidden_size=640, avg_pool=True, wider=True, embedding_dropout=0.0,
                 dropblock_dropout=0.1, dropblock_size=5, channels=3)
        ResNet12Backbone(avg_pool=True, wider=True, embedding_dropout=0.0, dropblock_dropout=0.1,
                         dropblock_size=5, channels=3)
        WRN28(output_size, hidden_size=640, dropout=0.0)
        WRN28Backbone(dropout=0.0)
        fc_init_(module)
        get_pretrained_backbone(model, dataset, spec='default', root='~/data', download=False)
        maml_init_(module)
    """,
    ".vision.models.cnn4": """
        LinearBlock(input_size, output_size)
        truncated_normal_(tensor, mean=0.0, std=1.0)
    """,
    ".vision.models.resnet12": """
        BasicBlock(inplanes, planes, stride=1, downsample=None, drop_rate=0.0, drop_block=False,
                   block_size=1)
        DropBlock(block_size)
        conv3x3(in_planes, out_planes, stride=1)
    """,
    ".vision.transforms": "RandomClassRotation(dataset, degrees)",
}
NAMES = [
    pytest.param(module, *found.groups(), id=f"{module}.{found[1]}".lstrip("."))
    for module, text in LEARN2LEARN.items()
    for found in re.finditer(r"(\w+)\((.*?)\)", text, re.DOTALL)
]
ELSEWHERE = {  # other paths that scripts import the same things from
    ".algorithms.maml": "MAML maml_update",
    ".algorithms.meta_sgd": "MetaSGD meta_sgd_update",
    ".algorithms.gbml": "GBML",
    ".algorithms.lightning": "LightningEpisodicModule LightningMAML LightningANIL",
    ".data.meta_dataset": "MetaDataset FilteredMetaDataset UnionMetaDataset",
    ".data.task_dataset": "DataDescription TaskDataset Taskset",
    ".data.utils": "InfiniteIterator OnDeviceDataset partition_task",
    ".nn.kroneckers": "KroneckerLinear KroneckerRNN KroneckerLSTM kronecker_addmm",
    ".nn.metalayers": "MetaModule ParameterTransform",
    ".nn.metaoptnet": "SVClassifier",
    ".nn.misc": "Flatten Lambda Scale freeze unfreeze",
    ".nn.protonet": "PrototypicalClassifier",
    ".optim.learnable_optimizer": "LearnableOptimizer",
    ".optim.parameter_update": "ParameterUpdate",
    ".optim.transforms": "KroneckerTransform MetaCurvatureTransform ModuleTransform "
    "ReshapedTransform TransformDictionary",
    ".optim.update_rules": "DifferentiableSGD",
    ".vision.models.cnn4": "CNN4 CNN4Backbone ConvBase ConvBlock MiniImagenetCNN OmniglotCNN "
    "OmniglotFC fc_init_ maml_init_",
    ".vision.models.resnet12": "ResNet12 ResNet12Backbone",
    ".vision.models.wrn28": "WRN28 WRN28Backbone",
}


def here(module: str, name: str) -> object:
    return getattr(importlib.import_module(f"fastmaml{module}"), name)


@pytest.mark.parametrize(("module", "name", "parameters"), NAMES)
def test_the_name_takes_the_same_arguments(module: str, name: str, parameters: str) -> None:
    theirs = inspect.signature(eval(f"(lambda {parameters}: None)")).parameters.values()
    ours = list(inspect.signature(here(module, name)).parameters.values())
    for parameter, own in zip(theirs, ours, strict=False):
        assert own.name == parameter.name
        assert parameter.default in (own.default, parameter.empty)
    assert len(ours) >= len(theirs)
    for own in ours[len(theirs) :]:  # what we add is never needed
        assert own.default is not own.empty or own.kind in (own.VAR_KEYWORD, own.VAR_POSITIONAL)


@pytest.mark.parametrize("module", ELSEWHERE)
def test_the_names_are_where_else_learn2learn_has_them(module: str) -> None:
    depth = 3 if module.startswith(".vision") else 2
    main = ".".join(module.split(".")[:depth])
    for name in ELSEWHERE[module].split():
        assert here(module, name) is here(main, name)


def test_the_version_is_where_learn2learn_has_it() -> None:
    assert here("._version", "__version__") == fastmaml.__version__


def test_a_star_import_leaves_torchs_nn_and_optim_alone() -> None:
    names: dict[str, object] = {}
    exec("from torch import nn, optim\nfrom fastmaml import *", names)
    assert names["nn"] is torch.nn
    assert names["optim"] is torch.optim
    assert names["MAML"] is fastmaml.MAML
    assert fastmaml.nn.Scale
    assert fastmaml.optim.LearnableOptimizer


def test_nothing_that_takes_seconds_is_imported_unasked() -> None:
    code = "import sys, fastmaml, fastmaml.training; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torchvision", "matplotlib", "triton", "pytorch_lightning"} & set(
        run.stdout.split()
    )


def test_every_name_is_tested() -> None:
    tests = [p for p in Path(__file__).parent.glob("*.py") if p != Path(__file__)]
    words = set(re.findall(r"\w+", " ".join(path.read_text() for path in tests)))
    assert {parameter.values[1] for parameter in NAMES} - words == set()
