"""Data sets fetched from a stand-in for the servers: checksums, archives, what is fetched when."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote

import pytest
import torchvision.datasets.utils
from published_files import (
    WRITERS,
    write_aircraft,
    write_fungi,
    write_mini_imagenet,
    write_quickdraw,
)

from fastmaml.cli import main
from fastmaml.data.utils import download_file, download_file_from_google_drive
from fastmaml.vision import datasets
from fastmaml.vision.datasets import fetching
from fastmaml.vision.datasets.few_shot import chosen_classes


@pytest.fixture
def server(tmp_path, monkeypatch) -> Path:
    """A folder whose files can be downloaded, in Zenodo's place too, with their checksums."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setattr(
        torchvision.datasets.utils,
        "_urlretrieve",
        lambda url, place: shutil.copy(folder / url.rsplit("/", 1)[1], place),
    )
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, **_: url)

    def record(url: str, timeout: float) -> io.BytesIO:
        assert re.fullmatch(r"https://zenodo\.org/api/records/\d+", url)
        assert timeout > 0
        listed = [
            {"key": p.name, "checksum": f"md5:{hashlib.md5(p.read_bytes()).hexdigest()}"}
            for p in folder.iterdir()
        ]
        return io.BytesIO(json.dumps({"files": listed}).encode())

    monkeypatch.setattr(fetching, "urlopen", record)
    return folder


def publish(writer, server: Path, archive: str, inside: str = ".") -> None:
    """The files that a writer writes, as the archive they are published in."""
    writer(server / "files")
    shutil.make_archive(
        str(server / archive.split(".")[0]),
        "zip" if archive.endswith("zip") else "gztar",
        server / "files" / inside,
    )
    shutil.rmtree(server / "files")
    (made,) = server.glob(archive.split(".")[0] + "*")
    made.rename(server / archive)


@pytest.mark.parametrize(
    ("kind", "archive", "inside"),
    [
        (datasets.CIFARFS, "cifar100.zip", "cifarfs"),
        (datasets.FC100, "fc100.zip", "."),
        (datasets.CUBirds200, "CUB_200_2011.tgz", "cubirds200"),
        (datasets.FGVCAircraft, "fgvc-aircraft-2013b.tar.gz", "fgvc_aircraft"),
    ],
)
def test_archives_are_fetched_and_unpacked_once(kind, archive, inside, server, tmp_path) -> None:
    publish(WRITERS[kind], server, archive, inside)
    root = tmp_path / "data"
    assert len(kind(root, download=True)) > 0
    (server / archive).unlink()
    kind(root, download=True)
    assert not list(root.rglob("*.zip")) + list(root.rglob("*gz"))


def test_fungi_come_in_two_archives(server, tmp_path) -> None:
    write_fungi(server)
    folder = server / "fgvc_fungi"
    (server / "listings").mkdir()
    for listing in ("train.json", "val.json"):
        (folder / listing).rename(server / "listings" / listing)
    for name, files in (
        ("fungi_train_val", folder),
        ("train_val_annotations", server / "listings"),
    ):
        made = shutil.make_archive(str(server / name), "gztar", files)
        Path(made).rename(server / f"{name}.tgz")
    assert len(datasets.FGVCFungi(tmp_path / "data", download=True)) == 1394


def test_files_are_fetched_one_by_one(server, tmp_path) -> None:
    write_mini_imagenet(server)
    data = datasets.MiniImagenet(tmp_path / "data", "test", download=True)
    assert data[0][0][0, 5, 5] == 20
    write_quickdraw(server)
    for file in (server / "quickdraw").iterdir():
        file.rename(server / quote(file.name))
    assert len(datasets.Quickdraw(tmp_path / "data", "test", download=True)) > 100
    assert (tmp_path / "data" / "quickdraw" / "ice cream.npy").exists() == (
        "ice cream" in chosen_classes("Quickdraw", "test")
    )


def test_a_file_with_another_checksum_is_refused(server, tmp_path, monkeypatch) -> None:
    write_mini_imagenet(server)
    monkeypatch.setattr(fetching, "published_md5", lambda source: "0" * 32)
    with pytest.raises(
        ValueError, match=r"train\.pkl came with another checksum than the published"
    ):
        datasets.MiniImagenet(tmp_path / "data", download=True)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_file_with_the_published_checksum_is_not_fetched_again(server, tmp_path) -> None:
    (server / "a.zip").write_bytes(b"contents")
    source = "https://zenodo.org/record/12/files/a.zip"
    own = tmp_path / "data" / "a.zip"
    for before in (None, b"half of it"):
        if before is not None:
            own.write_bytes(before)
        assert fetching.fetch(source, own.parent) == own
        assert own.read_bytes() == b"contents"
    modified = own.stat().st_mtime_ns
    fetching.fetch(source, own.parent)
    assert own.stat().st_mtime_ns == modified


@pytest.mark.parametrize("where", ["the list of checksums", "the file"])
def test_a_server_that_is_not_reached_is_one_line(where, server, tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise URLError("no route to host")

    write_mini_imagenet(server)
    module, name = (
        (fetching, "urlopen")
        if where == "the list of checksums"
        else (torchvision.datasets.utils, "_urlretrieve")
    )
    monkeypatch.setattr(module, name, unreachable)
    root = tmp_path / "data"
    assert main(["data", "mini-imagenet", "--root", str(root), "--download"]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"fastmaml: https://zenodo\.org/\S+train\.pkl cannot be fetched \(.*no route to host.*\); "
        rf"try again, or put the file into {root} and give the same command\n",
        error,
    )
    assert list(root.rglob("*")) == []


def test_published_checksums_are_known(server) -> None:
    (server / "a.zip").write_bytes(b"contents")
    published = fetching.published_md5("https://zenodo.org/record/12/files/a.zip")
    assert published == hashlib.md5(b"contents").hexdigest()
    with pytest.raises(ValueError, match=r"record/12 lists no MD5 of b\.zip; fetch https://zenodo"):
        fetching.published_md5("https://zenodo.org/record/12/files/b.zip")
    assert fetching.published_md5(datasets.DescribableTextures._source).startswith("fff73e50")
    assert fetching.published_md5(datasets.FGVCAircraft._source) is None


def test_an_archive_put_there_by_hand_is_unpacked_and_stays(server, tmp_path) -> None:
    publish(write_aircraft, server, "fgvc-aircraft-2013b.tar.gz", "fgvc_aircraft")
    archive = tmp_path / "data" / "fgvc_aircraft" / "fgvc-aircraft-2013b.tar.gz"
    archive.parent.mkdir(parents=True)
    (server / archive.name).rename(archive)
    assert len(datasets.FGVCAircraft(tmp_path / "data", download=True)) == 100
    assert archive.exists()


def test_a_truncated_download_is_named(server, tmp_path) -> None:
    publish(write_aircraft, server, "fgvc-aircraft-2013b.tar.gz", "fgvc_aircraft")
    archive = server / "fgvc-aircraft-2013b.tar.gz"
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"fgvc-aircraft-2013b\.tar\.gz is damaged"):
        datasets.FGVCAircraft(tmp_path / "data", download=True)


def test_files_are_downloaded_to_where_they_are_wanted(tmp_path, monkeypatch) -> None:
    sent = {"https://host/a.bin": b"contents"}
    tools = "torchvision.datasets.utils."
    monkeypatch.setattr(f"{tools}_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        f"{tools}_urlretrieve", lambda url, place: Path(place).write_bytes(sent[url])
    )
    target = tmp_path / "new" / "own.bin"
    download_file("https://host/a.bin", target, size=8)
    assert target.read_bytes() == b"contents"
    asked = []
    monkeypatch.setattr(
        f"{tools}download_file_from_google_drive",
        lambda *args: asked.append(args),
    )
    download_file_from_google_drive("id7", str(target))
    assert asked == [("id7", str(tmp_path / "new"), "own.bin")]
