"""Folders of pictures, and the packed files beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_folder(root: Path, classes: int = 3, per_class: int = 4, side: int = 6) -> Path:
    random = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{c}" / f"{i}.png")
    return root


def kept(root: Path) -> list[Path]:
    return sorted(root.with_name(root.name + ".fastmaml").glob("*-*"))
