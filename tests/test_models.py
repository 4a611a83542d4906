"""The networks: what they compute, their names and their initial values."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastmaml import explain
from fastmaml.program.capture import capture
from fastmaml.vision.models import (
    CNN4,
    WRN28,
    CNN4Backbone,
    ConvBase,
    ConvBlock,
    LinearBlock,
    MiniImagenetCNN,
    OmniglotCNN,
    OmniglotFC,
    ResNet12,
    ResNet12Backbone,
    WRN28Backbone,
    fc_init_,
    get_pretrained_backbone,
    maml_init_,
)
from fastmaml.vision.models.cnn4 import truncated_normal_
from fastmaml.vision.models.resnet12 import BasicBlock, DropBlock, conv3x3

State = Mapping[str, Tensor]


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def batch_norm(x: Tensor, state: State, name: str, eps: float = 1e-5) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    weight, bias = (state[f"{name}.normalize.{p}"].view(shape) for p in ("weight", "bias"))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def conv_block(x: Tensor, state: State, name: str, stride: int = 1) -> Tensor:
    weight, bias = state[f"{name}.conv.weight"], state[f"{name}.conv.bias"]
    return F.relu(batch_norm(F.conv2d(x, weight, bias, stride, padding=1), state, name))


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def test_omniglot_cnn_is_strided_convolutions_and_a_mean() -> None:
    net, x = OmniglotCNN(7, hidden_size=5, layers=3).double(), torch.randn(4, 1, 28, 28).double()
    state, h = net.state_dict(), x
    for i in range(3):
        h = conv_block(h, state, f"features.1.{i}", stride=2)
    assert h.shape == (4, 5, 4, 4)
    expected = linear(h.mean((2, 3)), state, "classifier")
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net(x.flatten(1)), expected)
    torch.testing.assert_close(net.classifier(net.features(x)), expected)


def test_omniglot_fc_normalises_by_the_batch_alone() -> None:
    net, x = OmniglotFC(12, 3, sizes=[6, 4]).double(), torch.randn(5, 3, 2, 2).double()
    state, h = net.state_dict(), x.flatten(1)
    for i in range(2):
        h = linear(h, state, f"features.1.{i}.linear")
        h = F.relu(batch_norm(h, state, f"features.1.{i}", eps=1e-3))
    expected = linear(h, state, "classifier")
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net.eval()(x), expected)
    assert not list(net.buffers())


def test_a_linear_block_is_linear_norm_relu() -> None:
    net, x = nn.Sequential(LinearBlock(4, 3)).double(), torch.randn(5, 4).double()
    h = linear(x, net.state_dict(), "0.linear")
    torch.testing.assert_close(net(x), F.relu(batch_norm(h, net.state_dict(), "0", eps=1e-3)))


def test_cnn4_pools_after_each_convolution() -> None:
    net, x = (
        CNN4(6, hidden_size=4, channels=2, embedding_size=16).double(),
        torch.rand(3, 2, 32, 35),
    )
    x = x.double()
    state, h = net.state_dict(), x
    for i in range(4):
        h = F.max_pool2d(conv_block(h, state, f"features.{i}"), 2)
    torch.testing.assert_close(net(x), linear(h.flatten(1), state, "classifier"))


def test_fewer_layers_pool_more() -> None:
    assert CNN4Backbone(hidden_size=3, layers=2)(torch.rand(2, 3, 84, 84)).shape == (2, 3 * 5 * 5)
    assert CNN4Backbone(hidden_size=3, layers=1)(torch.rand(2, 3, 84, 84)).shape == (2, 3 * 10 * 10)
    wide = CNN4Backbone(hidden_size=3, layers=2, max_pool_factor=1)
    assert wide(torch.rand(2, 3, 84, 84)).shape == (2, 3 * 21 * 21)
    strided = CNN4(5, hidden_size=3, layers=2, max_pool=False, embedding_size=3 * 6 * 6)
    assert strided(torch.rand(2, 3, 84, 84)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"stride 2 \* max_pool_factor of 1 or more, got 0"):
        CNN4(5, layers=5)


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (lambda: CNN4(5, hidden_size=32), 32901),  # the MAML paper's mini-ImageNet network
        (lambda: OmniglotCNN(5), 112261),
        (lambda: OmniglotFC(784, 5), 247621),
        (lambda: ConvBase(hidden=32, channels=3, max_pool=True, layers=2), 10272),
    ],
)
def test_sizes_are_those_of_the_literature(module, parameters: int) -> None:
    assert size(module()) == parameters


def test_state_dicts_have_learn2learns_names() -> None:
    block = [f"normalize.{n}" for n in ("weight", "bias", "running_mean", "running_var")]
    block += ["normalize.num_batches_tracked", "conv.weight", "conv.bias"]
    ends = ["classifier.weight", "classifier.bias"]
    blocks = [f"{i}.{name}" for i in range(4) for name in block]
    assert list(CNN4(5).state_dict()) == [f"features.{name}" for name in blocks] + ends
    assert list(OmniglotCNN().state_dict()) == (
        [f"base.{name}" for name in blocks] + [f"features.1.{name}" for name in blocks] + ends
    )
    layers = [f"{part}.{n}" for part in ("normalize", "linear") for n in ("weight", "bias")]
    assert list(OmniglotFC(9, 2).state_dict()) == (
        [f"features.1.{i}.{name}" for i in range(4) for name in layers] + ends
    )
    assert MiniImagenetCNN is CNN4


def test_a_checkpoint_comes_back() -> None:
    a, b = OmniglotCNN(3, hidden_size=4), OmniglotCNN(3, hidden_size=4)
    b.load_state_dict(a.state_dict())
    assert b.base[0].conv.weight is b.features[1][0].conv.weight
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(a(x), b(x))


# --- initial values ---------------------------------------------------------------------------


def test_fc_init_is_a_normal_cut_off_at_two_deviations() -> None:
    layer = nn.Linear(300, 300)
    assert fc_init_(layer) is layer
    assert layer.weight.abs().max() <= 0.02
    assert layer.weight.abs().max() > 0.0199
    # A standard normal within two deviations has deviation 0.8796.
    assert layer.weight.std().item() == pytest.approx(0.008796, rel=0.01)
    assert abs(layer.weight.mean().item()) < 1e-4
    assert not layer.bias.any()
    assert isinstance(fc_init_(nn.BatchNorm1d(3, affine=False)), nn.BatchNorm1d)


def test_maml_init_is_xavier_uniform() -> None:
    layer = nn.Conv2d(40, 60, 3)
    assert maml_init_(layer) is layer
    bound = (6 / (9 * 100)) ** 0.5
    assert bound * 0.999 < layer.weight.abs().max() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not layer.bias.any()


def test_networks_use_these_initial_values() -> None:
    block = ConvBlock(16, 2000, 3)
    assert 0 <= block.normalize.weight.min() < 0.01
    assert 0.99 < block.normalize.weight.max() <= 1
    assert block.normalize.weight.mean().item() == pytest.approx(0.5, abs=0.03)
    assert not block.normalize.bias.any()
    assert not block.conv.bias.any()
    assert block.conv.weight.abs().max() <= (6 / (9 * 2016)) ** 0.5
    head = OmniglotCNN(200, hidden_size=100, layers=1).classifier
    assert head.weight.std().item() == pytest.approx(1, rel=0.03)
    assert not head.bias.any()
    assert CNN4(5, hidden_size=4).classifier.weight.abs().max() <= (6 / 105) ** 0.5
    fully_connected = OmniglotFC(9, 4)
    assert fully_connected.classifier.weight.abs().max() <= 0.02
    assert fully_connected.features[1][0].linear.weight.abs().max() <= 0.02
    assert torch.equal(fully_connected.features[1][0].normalize.weight, torch.ones(256))


# --- residual networks ------------------------------------------------------------------------

RESIDUAL = {  # outputs of learn2learn 0.2.1 for `spread` parameters and inputs
    "wider": (lambda: ResNet12(5, dropblock_dropout=0.0),
              [-32.0700, -267.2288, -65.1760, -65.6704, -116.5114]),
    "narrower": (lambda: ResNet12(5, hidden_size=512, wider=False, dropblock_dropout=0.0),
                 [-22.9883, -45.7369, -11.8456, -31.9472, -80.9724]),
    "all positions": (lambda: ResNet12(5, hidden_size=16000, avg_pool=False),
                      [-167.7866, 353.3308, -156.1737, -321.6960, -427.6126]),
}  # fmt: skip


def spread(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, (name, p) in enumerate(net.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            p *= 0.05 if p.ndim > 1 else 0.3
            p += "bn" in name and name.endswith("weight")
    return net


@pytest.mark.parametrize("kind", RESIDUAL)
def test_resnet12_is_learn2learns(kind) -> None:
    make, expected = RESIDUAL[kind]
    x = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        y = spread(make()).eval()(x)
    torch.testing.assert_close(y[0], torch.tensor(expected), rtol=1e-4, atol=1e-2)


def test_a_block_of_ones_own() -> None:
    """Without a downsampling the shortcut is the input, as in learn2learn."""
    block, x = BasicBlock(4, 4).double(), torch.randn(2, 4, 5, 5).double()
    assert block.conv1.weight.shape == conv3x3(4, 4).weight.shape
    h = x
    for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
        h = F.leaky_relu(norm(conv(h)), 0.1)
    expected = F.leaky_relu(block.bn3(block.conv3(h)) + x, 0.1)
    torch.testing.assert_close(block(x), expected)
    halving = BasicBlock(4, 6, 2, downsample=nn.Conv2d(4, 6, 1), drop_rate=0.1)
    assert halving(x.float()).shape == (2, 6, 2, 2)


def test_a_normal_distribution_is_cut_off_at_two_deviations() -> None:
    torch.manual_seed(0)
    tensor = torch.empty(10_000)
    assert truncated_normal_(tensor, mean=1.0, std=0.5) is tensor
    assert (tensor - 1).abs().max() <= 1
    assert abs(float(tensor.mean()) - 1) < 0.02
    assert abs(float(tensor.std()) - 0.44) < 0.01  # which the cut leaves


def test_residual_networks_start_and_are_named_as_in_learn2learn() -> None:
    for make, parameters, absolute in (
        (ResNet12, 12_427_525, 223467.324),
        (WRN28, 36_486_085, 292832.268),
    ):
        torch.manual_seed(3)
        net = make(5)
        assert size(net) == parameters
        total = sum(p.detach().double().abs().sum() for p in net.parameters())
        assert abs(float(total) - absolute) < 0.01
    names = {name for name, _ in net.named_parameters()}
    assert {"features.layer2.0.shortcut.0.weight", "features.layer1.3.conv2.bias"} <= names
    assert "features.layer4.0.downsample.1.bias" in dict(ResNet12(5).named_parameters())


@pytest.mark.parametrize(
    ("make", "backbone", "width"), [(ResNet12, ResNet12Backbone, 640), (WRN28, WRN28Backbone, 640)]
)
def test_backbones_are_the_networks_features(make, backbone, width) -> None:
    net, features = make(5).eval(), backbone().eval()
    features.load_state_dict(net.features.state_dict())
    x = torch.randn(2, 3, 84, 84)
    with torch.no_grad():
        y = features(x)
        assert y.shape == (2, width)
        torch.testing.assert_close(net.classifier(y), net(x))


# --- weights that are published ---------------------------------------------------------------


def test_pretrained_weights_are_read_from_their_file(tmp_path) -> None:
    path = tmp_path / "pretrained_models" / "fc100" / "cnn4.pth"
    path.parent.mkdir(parents=True)
    trained = CNN4Backbone()
    torch.save(trained.state_dict(), path)
    x = torch.rand(2, 3, 32, 32)
    loaded = get_pretrained_backbone("cnn4", "fc100", root=tmp_path)
    torch.testing.assert_close(loaded(x), trained(x))
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"cnn4\.pth does not hold the weights of cnn4"):
        get_pretrained_backbone("cnn4", "fc100", "supervised", root=tmp_path)
    path.write_bytes(pickle.dumps({"weight": Path.home}, protocol=2))
    with pytest.raises(ValueError, match=r"cnn4\.pth does not hold the weights of cnn4"):
        get_pretrained_backbone("cnn4", "fc100", root=tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cnn4\.pth does not hold the weights of cnn4"):
        get_pretrained_backbone("cnn4", "fc100", root=tmp_path)


def test_pretrained_weights_are_fetched_where_they_are_asked_for(tmp_path, monkeypatch) -> None:
    def fetch(source: str, folder: Path, name: str) -> None:
        assert source == "https://zenodo.org/record/5651278/files/2mbq7efr.pth"
        folder.mkdir(parents=True)
        torch.save(CNN4Backbone().state_dict(), folder / name)

    monkeypatch.setattr("fastmaml.vision.models.pretrained.fetch", fetch)
    with pytest.raises(FileNotFoundError, match=r"cnn4\.pth is missing; it comes from https://zen"):
        get_pretrained_backbone("cnn4", "cifar-fs", root=tmp_path)
    for _ in range(2):
        get_pretrained_backbone("cnn4", "cifar-fs", root=tmp_path, download=True)
    with pytest.raises(ValueError, match="got 'cnn4' on 'mini-imagenet', 'default'"):
        get_pretrained_backbone("cnn4", "mini-imagenet", root=tmp_path)


def test_dropped_squares_keep_the_mean() -> None:
    block = DropBlock(3).train()
    x = torch.ones(4, 8, 12, 12)
    y = block(x, gamma=0.02)
    assert y.mean() == pytest.approx(1, abs=1e-5)
    dropped = y == 0
    assert 0.02 < dropped.float().mean() < 0.4
    squares = F.avg_pool2d(dropped.float(), 3, stride=1).eq(1).float()
    covered = F.max_pool2d(F.pad(squares, [2] * 4), 3, stride=1).bool()
    assert torch.equal(covered, dropped)
    assert torch.equal(block.eval()(x, gamma=0.02), x)


def test_dropped_squares_are_no_larger_than_small_images() -> None:
    net = ResNet12(5, hidden_size=2048, wider=False, avg_pool=False, dropblock_dropout=0.5)
    output = net.train()(torch.randn(4, 3, 32, 32))  # its last maps have 4 and 2 positions a side
    assert output.isfinite().all()


TORCHVISION = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1"),
]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_convolutional_networks_are_native(name: str) -> None:
    graph = capture(getattr(torchvision.models, name)(num_classes=5), torch.randn(5, 3, 64, 64))
    assert graph.values[graph.output] == (5,)


def test_resnet12_runs_natively_without_dropout() -> None:
    net = ResNet12(3, hidden_size=2048, wider=False, avg_pool=False, dropblock_dropout=0.0)
    plan = str(explain(net, torch.randn(2, 3, 32, 32)))
    assert "cpu backend" in plan
