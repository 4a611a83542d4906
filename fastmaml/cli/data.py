"""`fastmaml data`: fetch a data set, or check the one that is there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from tqdm import tqdm

from fastmaml.cli.options import Verbs
from fastmaml.vision import datasets
from fastmaml.vision.datasets import FewShotImages
from fastmaml.vision.datasets.full_omniglot import OmniglotInPlace


class Expected(NamedTuple):
    """A data set's class, and the published numbers of classes and images of each mode."""

    open: Callable[..., FewShotImages]
    sizes: dict[str, tuple[int, int]]


DATA_SETS = {
    "omniglot": Expected(OmniglotInPlace, {"all": (1623, 32460)}),
    "mini-imagenet": Expected(
        datasets.MiniImagenet,
        {"train": (64, 38400), "validation": (16, 9600), "test": (20, 12000)},
    ),
    "tiered-imagenet": Expected(
        datasets.TieredImagenet,
        {"train": (351, 448695), "validation": (97, 124261), "test": (160, 206209)},
    ),
    "cifarfs": Expected(
        datasets.CIFARFS, {"train": (64, 38400), "validation": (16, 9600), "test": (20, 12000)}
    ),
    "fc100": Expected(
        datasets.FC100, {"train": (60, 36000), "validation": (20, 12000), "test": (20, 12000)}
    ),
    "cubirds200": Expected(datasets.CUBirds200, {"all": (200, 11745)}),
    "fgvc-aircraft": Expected(datasets.FGVCAircraft, {"all": (100, 10000)}),
    "describable-textures": Expected(datasets.DescribableTextures, {"all": (47, 5640)}),
    "fgvc-fungi": Expected(datasets.FGVCFungi, {"all": (1394, 89760)}),
    "quickdraw": Expected(datasets.Quickdraw, {"all": (345, 50426266)}),
    "vgg-flower102": Expected(datasets.VGGFlower102, {"all": (102, 8189)}),
}
_OPENED = 20  # images of each mode that are opened, if not every one


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "data",
        help="fetch a data set, or check the one that is there",
        description="Fetch a data set with --download, then count its classes and images, compare "
        "with the published numbers, and open some of the images, or every one. Without --download "
        "nothing is written.",
    )
    parser.add_argument("name", choices=sorted(DATA_SETS))
    parser.add_argument("--root", required=True, help="the folder of all data")
    parser.add_argument("--download", action="store_true", help="fetch what is missing")
    parser.add_argument(
        "--every-image", action="store_true", help="open all images, and name the first damaged one"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 where the numbers are not the published ones."""
    expected = DATA_SETS[arguments.name]
    complete = True
    for mode, size in expected.sizes.items():
        named = {} if expected.open is OmniglotInPlace else {"mode": mode}
        data = expected.open(arguments.root, download=arguments.download, **named)
        complete &= verify(data, mode, size, arguments.every_image)
    return 0 if complete else 1


def verify(
    data: FewShotImages, mode: str, size: tuple[int, int], every_image: bool = False
) -> bool:
    """Print what is there; False where it is not what was published.

    Raises:
        ValueError: an image that is opened is damaged.
    """
    found = (len(data.class_sizes()), len(data))
    step = 1 if every_image else max(1, len(data) // _OPENED)
    for i in tqdm(range(0, len(data), step), unit="image", leave=False, disable=not every_image):
        data[i]
    verdict = "complete" if found == size else f"expected {size[0]} classes, {size[1]:,} images"
    print(f"{data.name} {mode}: {found[0]} classes, {found[1]:,} images: {verdict}")
    return found == size
