"""Published data sets with files that are missing, damaged or empty: named, with what to do."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published_files import (
    WRITERS,
    dump,
    write_aircraft,
    write_birds,
    write_fc100,
    write_flowers,
    write_fungi,
    write_omniglot,
    write_textures,
    write_tiered_imagenet,
)

from fastmaml.vision import datasets


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_file_is_named_with_the_command_that_fetches_it(kind, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"comes from https://.* --download` fetches it"):
        kind(tmp_path)


def test_unknown_modes_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="mode must be one of train, validation, test, got 'val'"):
        datasets.FC100(tmp_path, "val")


class Intruder:
    def __reduce__(self):
        return (print, ("code from a data file",))


@pytest.mark.parametrize(
    "contents",
    [
        Intruder(),
        {"image_data": 3},
        {"class_dict": {}},
        {"image_data": np.full((2, 84, 84, 3), np.nan), "class_dict": {"a": [0, 1]}},
        {"image_data": np.zeros((2, 84, 83, 3), np.uint8), "class_dict": {"a": [0, 1]}},
        {"image_data": np.zeros((2, 84, 84, 3), np.uint8), "class_dict": {"a": [0, 1], "b": []}},
        {"image_data": np.zeros((2, 84, 84, 3), np.uint8), "class_dict": {"a": [0, 2]}},
    ],
)
def test_foreign_pickles_are_refused(contents, tmp_path, capsys) -> None:
    dump(contents, tmp_path / "mini-imagenet-cache-train.pkl")
    with pytest.raises(ValueError, match=r"mini-imagenet-cache-train\.pkl (is damaged|must)"):
        datasets.MiniImagenet(tmp_path)
    assert capsys.readouterr().out == ""


def test_truncated_files_are_named(tmp_path) -> None:
    write_fc100(tmp_path)
    path = tmp_path / "FC100_train.pickle"
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")):
        datasets.FC100(tmp_path)
    write_textures(tmp_path)
    data = datasets.DescribableTextures(tmp_path)
    Path(data.samples[0][0]).write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match=re.escape(f"{data.samples[0][0]} cannot be read")):
        data[0]


@pytest.mark.parametrize(
    ("write", "kind", "listing"),
    [
        (write_birds, datasets.CUBirds200, "CUB_200_2011/images.txt"),
        (write_birds, datasets.CUBirds200, "CUB_200_2011/bounding_boxes.txt"),
        (write_aircraft, datasets.FGVCAircraft, "data/images_variant_val.txt"),
        (write_aircraft, datasets.FGVCAircraft, "data/images_box.txt"),
    ],
)
@pytest.mark.parametrize("end", [b"17", b"\xff\xfe"])
def test_damaged_listings_are_named(write, kind, listing, end, tmp_path) -> None:
    write(tmp_path)
    (path,) = tmp_path.rglob(listing)
    path.write_bytes(path.read_bytes() + b"\n" + end)
    message = f"{path} is damaged .* delete {path.parent} and fetch it again"
    with pytest.raises(ValueError, match=message):
        kind(tmp_path, bounding_box_crop=True)


def test_a_truncated_zip_is_named_and_not_half_unpacked(tmp_path) -> None:
    write_omniglot(tmp_path, zipped=True)
    archive = tmp_path / "omniglot-py" / "images_background.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(f"{archive} is damaged")):
            datasets.FullOmniglot(tmp_path)
    assert {p.suffix for p in archive.parent.iterdir()} == {".zip"}


def test_labels_that_do_not_fit_are_refused(tmp_path) -> None:
    write_tiered_imagenet(tmp_path)
    labels = tmp_path / "tiered-imagenet" / "train_labels.pkl"
    dump({"label_specific": np.arange(7)}, labels)
    with pytest.raises(ValueError, match="must label the 8 images"):
        datasets.TieredImagenet(tmp_path)


@pytest.mark.parametrize("data", [np.full((6, 32, 32, 3), np.nan), np.zeros((6, 32), np.uint8)])
def test_images_of_other_numbers_are_refused(data, tmp_path) -> None:
    path = tmp_path / "FC100_train.pickle"
    dump({"data": data, "labels": [1, 1, 2, 2, 3, 3]}, path)
    message = f"{path} must hold data [N, 32, 32, 3] of uint8, got {list(data.shape)} of"
    with pytest.raises(ValueError, match=re.escape(message)):
        datasets.FC100(tmp_path)


CLASS_FOLDERS = (datasets.CIFARFS, datasets.CUBirds200, datasets.DescribableTextures)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [(kind, missing) for kind in CLASS_FOLDERS for missing in (True, False)]
    + [(datasets.FullOmniglot, False)],  # whose classes are listed nowhere
)
def test_a_class_without_images_is_named(kind, missing, tmp_path) -> None:
    WRITERS[kind](tmp_path)
    folder = Path(kind(tmp_path).samples[0][0]).parent
    shutil.rmtree(folder)
    if not missing:
        folder.mkdir()
    expected = FileNotFoundError if missing else ValueError
    message = rf"{folder}.* https://.* delete .*, then `fastmaml data {kind.name} --root {tmp_path}"
    with pytest.raises(expected, match=message):
        kind(tmp_path)


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        (datasets.FGVCAircraft, write_aircraft),
        (datasets.VGGFlower102, write_flowers),
        (datasets.FGVCFungi, write_fungi),
    ],
)
def test_a_picture_that_is_listed_and_missing_is_named(kind, write, tmp_path) -> None:
    write(tmp_path)
    file = Path(kind(tmp_path).samples[-1][0])
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{file} is missing; .* delete .*, then `fastmaml"
    ):
        kind(tmp_path)


def test_every_kind_of_damage_is_named(tmp_path) -> None:
    """What Pillow takes for a bomb is no OSError."""
    write_aircraft(tmp_path)
    data = datasets.FGVCAircraft(tmp_path, bounding_box_crop=True)
    Image.new("1", (20_000, 20_000)).save(data.samples[0][0], "png")
    with pytest.raises(ValueError, match=rf"{data.samples[0][0]} cannot be read \(Decompression"):
        data[0]
    data.boxes.clear()
    with pytest.raises(ValueError, match=rf"{data.samples[1][0]} cannot be read \(KeyError"):
        data[1]
