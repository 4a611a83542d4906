"""A data set of characters drawn from the fonts that matplotlib carries: no download.

Several hundred classes of 20 images, 28x28: a class is a character, its images are the faces
that have it (DejaVu and STIX, sans, serif and mono, upright and slanted, regular and bold), each
with a small random affine change. Whole scripts are held out, and a character that looks like one
already taken (Latin A, Greek Alpha, Cyrillic A) is left out, so that a test class is never a
training class under another name.
"""

from __future__ import annotations

import hashlib
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmaml.files import cache_directory
from fastmaml.vision.datasets.image_classes import ImageClasses, Split, load_or_make

SIZE = 28
INSTANCES = 20
LOOK_ALIKE = 0.88
SEED = 1

FACES = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSansMono",
    "STIXGeneral",
    "DejaVuSans-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSans-Oblique",
    "STIXGeneralItalic",
    "DejaVuSerif-Bold",
    "STIXGeneralBol",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif-BoldItalic",
    "STIXGeneralBolIta",
    "DejaVuSansMono-BoldOblique",
)

# First and last code point of each block of a script.
Blocks = tuple[tuple[int, int], ...]
TRAIN_SCRIPTS: dict[str, Blocks] = {
    "Latin": ((0x41, 0x5A), (0x61, 0x7A), (0x180, 0x2AF)),
    "Digits": ((0x30, 0x39),),
    "Greek": ((0x370, 0x3FF),),
    "Cyrillic": ((0x400, 0x52F),),
    "Arabic": ((0x620, 0x6FF),),
    "Syllabics": ((0x1400, 0x167F),),
    "Arrows": ((0x2190, 0x21FF),),
    "Operators": ((0x2200, 0x22FF),),
    "Shapes": ((0x25A0, 0x25FF),),
}
VALIDATION_SCRIPTS: dict[str, Blocks] = {
    "Lao": ((0xE80, 0xEFF),),
    "Nko": ((0x7C0, 0x7FF),),
}
TEST_SCRIPTS: dict[str, Blocks] = {
    "Armenian": ((0x530, 0x58F),),
    "Georgian": ((0x10A0, 0x10FF), (0x2D00, 0x2D2F)),
    "Hebrew": ((0x5D0, 0x5EA),),
    "Tifinagh": ((0x2D30, 0x2D6F),),
}
SCRIPTS = TRAIN_SCRIPTS | VALIDATION_SCRIPTS | TEST_SCRIPTS


def load_glyphs() -> ImageClasses:
    """The whole data set; drawn in a few seconds the first time, then read from the user's cache.

    Class names are `"script/character"`. The same version of matplotlib gives the same images.
    """
    cache = cache_directory()
    places = [] if cache is None else [cache / "glyphs.npz"]
    return load_or_make(places, _fingerprint(), draw_glyphs)


def split_glyphs(data: ImageClasses) -> Split:
    """Training, validation and test classes, by script."""

    def classes(scripts: dict[str, Blocks]) -> list[int]:
        return [i for i, name in enumerate(data.names) if name.split("/")[0] in scripts]

    return Split(classes(TRAIN_SCRIPTS), classes(VALIDATION_SCRIPTS), classes(TEST_SCRIPTS))


def draw_glyphs() -> ImageClasses:
    """Draw every class, without the cache."""
    names, images = [], []
    for script, character in _distinct(_candidates()):
        names.append(f"{script}/{character}")
        images.append(_draw_class(character))
    labels = torch.arange(len(names), device="cpu").repeat_interleave(INSTANCES)
    return ImageClasses(torch.from_numpy(np.concatenate(images)), labels, names)


def _candidates() -> list[tuple[str, str]]:
    """Single characters that DejaVu Sans, which has all these scripts, really draws."""
    drawn = _characters(FACES[0])
    return [
        (script, chr(code))
        for script, blocks in SCRIPTS.items()
        for first, last in blocks
        for code in range(first, last + 1)
        if code in drawn and _stands_alone(chr(code)) and _outline(FACES[0], chr(code)) is not None
    ]


def _stands_alone(character: str) -> bool:
    """A letter, digit or symbol that is not another one with an accent, nor a small modifier."""
    category = unicodedata.category(character)
    return category[0] in "LNS" and category != "Lm" and not unicodedata.decomposition(character)


def _distinct(candidates: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Drop each character that looks like an earlier one of any script."""
    outlines = [_outline(FACES[0], character) for _, character in candidates]
    images = [_rasterise([(outline, np.eye(2), np.zeros(2))])[0] for outline in outlines]
    shapes = np.stack([_shape(image) for image in images])
    likeness = shapes @ shapes.T
    taken: list[int] = []
    for index in range(len(candidates)):
        if not taken or likeness[index, taken].max() <= LOOK_ALIKE:
            taken.append(index)
    return [candidates[index] for index in taken]


def _shape(image: np.ndarray) -> np.ndarray:
    """The image slightly blurred and normalised, so that a dot product is a correlation."""
    padded = np.pad(image.astype(np.float64), 1)
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    blurred = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]).ravel()
    blurred -= blurred.mean()
    return blurred / np.linalg.norm(blurred)


def _draw_class(character: str) -> np.ndarray:
    """`[INSTANCES, SIZE, SIZE]`: the faces that have the character in turn, each time changed."""
    faces = [face for face in FACES if ord(character) in _characters(face)]
    outlines = [path for face in faces if (path := _outline(face, character)) is not None]
    random = np.random.default_rng([SEED, ord(character)])
    drawings = []
    for index in range(INSTANCES):
        shift = random.uniform(-1.5, 1.5, size=2)
        drawings.append((outlines[index % len(outlines)], _jitter(random), shift))
    return _rasterise(drawings)


def _jitter(random: np.random.Generator) -> np.ndarray:
    """A 2x2 map: a turn of up to 9 degrees, a shear, and a change of width and of height."""
    angle = np.deg2rad(random.uniform(-9, 9))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1.0, random.uniform(-0.12, 0.12)], [0.0, 1.0]])
    return turn @ shear @ np.diag(random.uniform(0.82, 1.08, size=2))


def _rasterise(drawings: list[tuple[Any, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Draw (outline, map, shift in pixels) side by side: uint8 `[len(drawings), SIZE, SIZE]`."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.transforms import Affine2D, Bbox

    renderer = RendererAgg(SIZE * len(drawings), SIZE, 72)
    context = renderer.new_gc()
    context.set_linewidth(0)
    for index, (outline, change, shift) in enumerate(drawings):
        (a, c), (b, d) = 0.75 * SIZE * change
        x, y = shift + SIZE / 2
        place = Affine2D.from_values(a, b, c, d, x + SIZE * index, y)
        context.set_clip_rectangle(Bbox.from_bounds(SIZE * index, 0, SIZE, SIZE))
        renderer.draw_path(context, outline, place, (0, 0, 0, 1))
    ink = np.asarray(renderer.buffer_rgba())[..., 3]
    return ink.reshape(SIZE, len(drawings), SIZE).swapaxes(0, 1).copy()


@cache
def _outline(face: str, character: str) -> Any:
    """The outline as a matplotlib path centred on 0, its longer side 1; None where it is blank."""
    from matplotlib.path import Path as Outline

    font, flags = _font(face)
    font.load_char(ord(character), flags=flags)
    points, codes = font.get_path()
    if len(points) == 0:
        return None
    drawn = points[codes != Outline.CLOSEPOLY]
    low, high = drawn.min(axis=0), drawn.max(axis=0)
    return Outline((points - (low + high) / 2) / (high - low).max(), codes)


@cache
def _characters(face: str) -> frozenset[int]:
    """The code points that a face has; any other one would be drawn as an empty box."""
    return frozenset(_font(face)[0].get_charmap())


@cache
def _font(face: str) -> tuple[Any, Any]:
    from matplotlib import ft2font

    flags = getattr(ft2font, "LoadFlags", None)  # matplotlib 3.10 on; plain numbers before
    no_hinting = flags.NO_HINTING if flags else getattr(ft2font, "LOAD_NO_HINTING")  # noqa: B009
    font = ft2font.FT2Font(str(_font_file(face)))
    font.set_size(64, 72)
    return font, no_hinting


def _font_file(face: str) -> Path:
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def _fingerprint() -> str:
    """Changes with this file, the fonts, and the versions that decide how they are drawn."""
    import matplotlib

    digest = hashlib.sha256(f"{matplotlib.__version__} {unicodedata.unidata_version}".encode())
    digest.update(Path(__file__).read_bytes())
    for face in FACES:
        digest.update(_font_file(face).read_bytes())
    return f"glyphs-{digest.hexdigest()}"
