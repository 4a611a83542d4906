"""Few-shot data sets as batches of tasks, one call each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmaml.data.episodes import EpisodeSampler, Rotations
from fastmaml.data.packed import pack
from fastmaml.data.task_batch import TaskBatch

BatchTransform = Callable[[Tensor], Tensor]
_PARTS = ("train", "validation", "test")


class FewShot:
    """An :class:`EpisodeSampler` whose support and query images are changed, each in its way.

    Attributes:
        sampler: where the batches come from.
    """

    def __init__(
        self,
        sampler: EpisodeSampler,
        transform: BatchTransform | None = None,
        test_transform: BatchTransform | None = None,
    ) -> None:
        self.sampler = sampler
        self.transform = transform
        self.test_transform = test_transform

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        return self.sample()

    def sample(self) -> TaskBatch:
        """The next batch."""
        batch = self.sampler.sample()
        return batch._replace(
            support_x=_changed(batch.support_x, self.transform),
            query_x=_changed(batch.query_x, self.test_transform),
        )

    def state_dict(self) -> dict[str, int]:
        """See :meth:`EpisodeSampler.state_dict`."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See :meth:`EpisodeSampler.load_state_dict`."""
        self.sampler.load_state_dict(state)


def _changed(x: Tensor, transform: BatchTransform | None) -> Tensor:
    return x if transform is None else transform(x)


def _helper(
    summary: str,
    open_part: Callable[[Path, str, bool], tuple[Any, list[Any] | None]],
    rotations: Rotations = False,
) -> Callable[..., FewShot]:
    def open_few_shot(
        root: str | Path,
        shots: int,
        ways: int,
        *,
        test_shots: int | None = None,
        tasks: int = 16,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        transform: BatchTransform | None = None,
        test_transform: BatchTransform | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        download: bool = False,
        **options: Any,
    ) -> FewShot:
        chosen = [p for p, on in zip(_PARTS, (meta_train, meta_val, meta_test), strict=True) if on]
        if len(chosen) != 1:
            raise ValueError(
                "one of meta_train, meta_val and meta_test must be True, got "
                f"{', '.join(chosen) or 'none'}"
            )
        data, classes = open_part(Path(root).expanduser(), chosen[0], download)
        sampler = EpisodeSampler(
            data,
            ways,
            shots,
            shots if test_shots is None else test_shots,
            tasks,
            classes=classes,
            seed=seed,
            device=device,
            **({"rotations": rotations} | options),
        )
        return FewShot(sampler, transform, test_transform)

    open_few_shot.__doc__ = f"""{summary}

    Args:
        root: the folder of all data.
        shots: support images of each class.
        ways: classes in a task.
        test_shots: query images of each class; None: as many as ``shots``.
        tasks: T, the tasks of a batch.
        meta_train, meta_val, meta_test: which classes; one of them is True.
        transform: of the support images ``[T, N, C, H, W]``, float32 from 0 to 1 unless scaled.
        test_transform: of the query images.
        seed: of the tasks; the split by classes is always the same.
        device: where images and batches are.
        download: fetch what is missing.
        options: rotations, scale, mean, std, rank, world_size, prefetch of :class:`EpisodeSampler`.

    Returns:
        An endless stream of :class:`TaskBatch`.

    Raises:
        ValueError: not exactly one of the three parts was asked for, or the tasks are impossible.
        FileNotFoundError: a file is missing and ``download`` is off.
    """
    return open_few_shot


def _omniglot_part(root: Path, part: str, download: bool) -> tuple[Any, list[Any]]:
    from fastmaml.vision.datasets import load_omniglot, split_omniglot

    data = load_omniglot(root, download)
    return (data.images, data.labels), getattr(split_omniglot(data), part)


def _mode(
    name: str, make_transform: Callable[[], Callable[[Any], Any]] | None = None
) -> Callable[[Path, str, bool], tuple[Any, None]]:
    def open_part(root: Path, part: str, download: bool) -> tuple[Any, None]:
        from fastmaml.vision import datasets

        kind = getattr(datasets, name)
        transform = None if make_transform is None else make_transform()
        return pack(kind(root, mode=part, transform=transform, download=download)), None

    return open_part


def _as_bytes(x: Tensor) -> Tensor:
    return x.byte()  # MiniImagenet gives the bytes as floats


def _square() -> Callable[[Any], Any]:
    from torchvision import transforms as images  # takes seconds: when it is needed

    return images.Compose([images.Resize(84), images.CenterCrop(84)])


omniglot = _helper(
    "Omniglot, 28x28: 1100 / 100 / 423 characters, each in four orientations a class of its own.",
    _omniglot_part,
    rotations="classes",
)
mini_imagenet = _helper(
    "mini-ImageNet, 84x84: 64 / 16 / 20 classes.", _mode("MiniImagenet", lambda: _as_bytes)
)
tiered_imagenet = _helper(
    "tiered-ImageNet, 84x84: 351 / 97 / 160 classes.", _mode("TieredImagenet")
)
cifarfs = _helper("CIFAR-FS, 32x32: 64 / 16 / 20 classes.", _mode("CIFARFS"))
fc100 = _helper("FC100, 32x32: 60 / 20 / 20 classes.", _mode("FC100"))
cub = _helper("Caltech-UCSD Birds, 84x84: 140 / 30 / 30 species.", _mode("CUBirds200", _square))
aircraft = _helper("FGVC Aircraft, 84x84: 70 / 15 / 15 variants.", _mode("FGVCAircraft", _square))
textures = _helper(
    "Describable Textures, 84x84: 33 / 7 / 7 kinds.", _mode("DescribableTextures", _square)
)
flowers = _helper("VGG Flowers, 84x84: 71 / 15 / 16 kinds.", _mode("VGGFlower102", _square))
fungi = _helper("FGVC Fungi, 84x84: 994 / 200 / 200 species.", _mode("FGVCFungi", _square))
quickdraw = _helper("Quick, Draw!, 28x28: 241 / 52 / 52 things.", _mode("Quickdraw"))
