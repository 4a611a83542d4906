"""Reading Omniglot from zips and folders, and the split by classes."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_files import real_omniglot

from fastmaml.vision.datasets import ImageClasses, load_omniglot, omniglot, split_omniglot
from fastmaml.vision.datasets.image_classes import load_or_make

ALPHABETS = {
    "images_background": {"Greek": 3, "Latin": 2},
    "images_evaluation": {"Angelic": 2},
}
DRAWINGS = 4


def drawing(character, number):
    """105x105, one bit a pixel, ink 0 as in the originals: one block, placed by its numbers."""
    page = np.ones((105, 105), dtype=bool)
    page[15 * character : 15 * character + 15, 15 * number : 15 * number + 15] = False
    return Image.fromarray(page)


def write_folders(folder):
    running = 0
    for part, alphabets in ALPHABETS.items():
        for alphabet, characters in alphabets.items():
            for character in range(characters):
                running += 1
                place = folder / part / alphabet / f"character{character + 1:02d}"
                place.mkdir(parents=True)
                for number in range(DRAWINGS):
                    image = drawing(running % 7, number)
                    image.save(place / f"{running:04d}_{number + 1:02d}.png")


def zip_folders(folder):
    for part in ALPHABETS:
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for path in sorted((folder / part).rglob("*")):
                archive.write(path, path.relative_to(folder))
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.suffix != ".zip":
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMAML_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["folders", "zips"])
def root(tmp_path, request):
    folder = tmp_path / "data" / "omniglot-py"
    write_folders(folder)
    if request.param == "zips":
        zip_folders(folder)
    return tmp_path / "data"


def test_reads_the_layout(root):
    data = load_omniglot(root)
    assert data.names == [
        "Greek/character01",
        "Greek/character02",
        "Greek/character03",
        "Latin/character01",
        "Latin/character02",
        "Angelic/character01",
        "Angelic/character02",
    ]
    assert data.images.shape == (7 * DRAWINGS, 28, 28)
    assert data.images.dtype == torch.uint8
    assert data.labels.tolist() == [label for label in range(7) for _ in range(DRAWINGS)]


def test_resizes_by_area_with_ink_high(root):
    """A block of 15 x 15 becomes 4 x 4 fully inked pixels (105 / 28 = 3.75)."""
    image = load_omniglot(root).images[2]  # character 1, drawing 2: rows 15 to 30, columns 30 to 45
    expected = torch.zeros(28, 28, dtype=torch.uint8)
    expected[4:8, 8:12] = 255
    assert torch.equal(image, expected)


def test_folders_and_zips_are_the_same_data(tmp_path):
    folder = tmp_path / "data" / "omniglot-py"
    write_folders(folder)
    from_folders, key = load_omniglot(tmp_path / "data"), omniglot._fingerprint(folder)
    (folder / "fastmaml-28x28.npz").unlink()
    zip_folders(folder)
    assert omniglot._fingerprint(folder) == key
    assert torch.equal(load_omniglot(tmp_path / "data").images, from_folders.images)


def test_second_load_reads_the_cache_beside_the_data(root, monkeypatch):
    first = load_omniglot(root)
    assert (root / "omniglot-py" / "fastmaml-28x28.npz").is_file()
    monkeypatch.setattr(omniglot, "_shrink", lambda *_: pytest.fail("should have been cached"))
    second = load_omniglot(root)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert first.names == second.names


def test_a_cache_with_a_flipped_bit_is_made_anew(tmp_path):
    place, data = (
        tmp_path / "kept.npz",
        ImageClasses(
            torch.randint(256, (40, 28, 28), dtype=torch.uint8), torch.arange(40), list("abcd") * 10
        ),
    )
    load_or_make([place], "key", lambda: data)
    whole = place.read_bytes()
    for position in range(0, len(whole), 61):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        place.write_bytes(damaged)
        found = load_or_make([place], "key", lambda: data)
        assert torch.equal(found.images, data.images)
        assert torch.equal(found.labels, data.labels)
        assert found.names == data.names


def test_changed_contents_are_read_again(tmp_path):
    folder = tmp_path / "data" / "omniglot-py"
    write_folders(folder)
    before = load_omniglot(tmp_path / "data")
    changed = folder / "images_background" / "Greek" / "character01" / "0001_01.png"
    drawing(6, 6).save(changed)
    after = load_omniglot(tmp_path / "data")
    assert not torch.equal(before.images[0], after.images[0])
    assert torch.equal(before.images[1:], after.images[1:])


def test_a_read_only_folder_is_left_alone(root, cache):
    folder = root / "omniglot-py"
    folder.chmod(0o555)
    try:
        load_omniglot(root)
        assert not list(folder.glob("*.npz"))
        assert len(list(cache.glob("omniglot-*.npz"))) == 1
    finally:
        folder.chmod(0o755)


def test_missing_file_says_which_where_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_omniglot(tmp_path)
    message = str(caught.value)
    assert "images_background.zip" in message
    assert str(tmp_path / "omniglot-py") in message
    assert "https://raw.githubusercontent.com/brendenlake/omniglot" in message
    assert f"fastmaml data omniglot --root {tmp_path} --download" in message


def test_download_fetches_only_what_is_missing(root, monkeypatch):
    calls = []

    def fake(url, folder, name, md5):
        calls.append((url.rsplit("/", 1)[1], Path(folder).parent, name, md5))
        with zipfile.ZipFile(Path(folder) / name, "w") as archive:
            drawing(1, 1).save(Path(folder) / "one.png")
            archive.write(Path(folder) / "one.png", "images_evaluation/Angelic/character01/a.png")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fake)
    load_omniglot(root, download=True)
    assert calls == []

    folder = root / "omniglot-py"
    for path in sorted(folder.rglob("*evaluation*/**/*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for path in folder.glob("images_evaluation*"):
        path.rmdir() if path.is_dir() else path.unlink()
    data = load_omniglot(root, download=True)
    name = "images_evaluation.zip"
    assert calls == [(name, folder, name, "6b91aef0f799c5bb55b94e3f2daec811")]
    assert data.names[-1] == "Angelic/character01"


def test_damaged_archive(tmp_path):
    folder = tmp_path / "omniglot-py"
    write_folders(folder)
    zip_folders(folder)
    archive = folder / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is damaged .*delete it"):
        load_omniglot(tmp_path)


def test_an_image_that_is_none(tmp_path):
    folder = tmp_path / "omniglot-py"
    write_folders(folder)
    (folder / "images_background" / "Greek" / "character02" / "0002_01.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"Greek/character02/0002_01\.png must be a PNG image"):
        load_omniglot(tmp_path)


def test_a_character_without_drawings(tmp_path):
    folder = tmp_path / "omniglot-py"
    write_folders(folder)
    character = folder / "images_background" / "Greek" / "character02"
    for file in character.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=rf"character, {character}, must hold images, got none"):
        load_omniglot(tmp_path)


@pytest.mark.parametrize("method", [1, 99])
def test_an_archive_of_a_kind_that_there_is_not(method, tmp_path):
    """As a flipped bit may make it: zipfile raises NotImplementedError."""
    folder = tmp_path / "omniglot-py"
    write_folders(folder)
    zip_folders(folder)
    archive = folder / "images_background.zip"
    contents = bytearray(archive.read_bytes())
    for start in (b"PK\x03\x04", b"PK\x01\x02"):
        entry = contents.rindex(start)  # of the last file; its method is two bytes
        place = entry + (8 if start[2] == 3 else 10)
        contents[place : place + 2] = method.to_bytes(2, "little")
    archive.write_bytes(contents)
    with pytest.raises(ValueError, match=r"images_background\.zip is damaged"):
        load_omniglot(tmp_path)


def test_an_empty_folder(tmp_path):
    for part in ALPHABETS:
        (tmp_path / "omniglot-py" / part).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"must hold images as alphabet/character/name\.png"):
        load_omniglot(tmp_path)


def classes(count):
    empty = torch.empty(0, 28, 28, dtype=torch.uint8)
    return ImageClasses(empty, torch.zeros(0, dtype=torch.int64), [f"a/{i}" for i in range(count)])


def test_split_is_disjoint_complete_and_seeded():
    split = split_omniglot(classes(1623), seed=3)
    assert [len(part) for part in split] == [1100, 100, 423]
    assert sorted(split.train + split.validation + split.test) == list(range(1623))
    assert split == split_omniglot(classes(1623), seed=3)
    assert split != split_omniglot(classes(1623), seed=4)


def test_split_needs_all_classes():
    with pytest.raises(ValueError, match=r"at least 1623 classes .* got 7"):
        split_omniglot(classes(7))


def test_the_real_data(tmp_path):
    real = real_omniglot().resolve()
    (tmp_path / "omniglot-py").mkdir()
    for part in ALPHABETS:
        (tmp_path / "omniglot-py" / f"{part}.zip").symlink_to(real / "omniglot-py" / f"{part}.zip")
    data = load_omniglot(tmp_path)
    assert len(data.images) == 32460
    assert len(data.names) == 1623
    assert data.labels.bincount().unique().tolist() == [20]
    assert len({name.split("/")[0] for name in data.names}) == 50
    assert (data.images.flatten(1).amax(dim=1) > 128).all()
    assert 0.05 < data.images.float().mean() / 255 < 0.12
