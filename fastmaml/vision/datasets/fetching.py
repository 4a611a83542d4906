"""Downloads, checked against the checksums that are published for them."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote
from urllib.request import urlopen

from fastmaml.vision.datasets.archives import DAMAGED

ZENODO = "https://zenodo.org/record/7978538/files"  # learn2learn's copies
_MD5 = {
    "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
    "dtd-r1.0.1.tar.gz": "fff73e5086ae6bdbea199a49dfb8a4c1",
    "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
_ZENODO_FILE = re.compile(r"https://zenodo\.org/record/(\d+)/files/(.+)")


def fetch(source: str, folder: Path, name: str | None = None) -> Path:
    """Download ``source`` into ``folder``, under its own name or ``name``; returns the file.

    A file that is there already and has the published checksum is taken as it is. What comes
    takes its name only when it is complete.

    Raises:
        FileNotFoundError: it cannot be fetched.
        ValueError: what came has another checksum.
    """
    from torchvision.datasets.utils import check_integrity, download_url  # takes seconds to import

    target = folder / (name or _file_name(source))
    try:
        md5 = published_md5(source)
        if md5 is not None and check_integrity(str(target), md5):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as unfinished:
            download_url(source, unfinished, target.name, md5)
            (Path(unfinished) / target.name).replace(target)
    except OSError as error:
        raise FileNotFoundError(
            f"{source} cannot be fetched ({error}); try again, or put the file into {folder} and "
            "give the same command"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"{source} came with another checksum than the published one ({error}); try again"
        ) from error
    return target


def fetch_archive(source: str, folder: Path) -> None:
    """:func:`fetch` and :func:`unpack` into ``folder``; the archive is deleted.

    One that somebody has put there is unpacked as it is, and stays.
    """
    archive = folder / _file_name(source)
    if archive.exists():
        unpack(archive)
        return
    fetch(source, folder)
    unpack(archive)
    archive.unlink()


def _file_name(source: str) -> str:
    return unquote(source.rsplit("/", 1)[1])


def unpack(archive: Path) -> None:
    """Unpack a zip or tar beside itself: all of it or nothing.

    Raises:
        ValueError: it is damaged.
    """
    with TemporaryDirectory(dir=archive.parent) as unfinished:
        try:
            _extract(archive, unfinished)
        except DAMAGED as error:
            raise ValueError(
                f"{archive} is damaged ({error}); delete it and fetch it again"
            ) from error
        for entry in Path(unfinished).iterdir():
            entry.rename(archive.parent / entry.name)


def _extract(archive: Path, folder: str) -> None:
    if archive.suffix == ".zip" or not hasattr(tarfile, "data_filter"):  # Python 3.10.11 and before
        shutil.unpack_archive(archive, folder)
    else:
        shutil.unpack_archive(archive, folder, filter="data")


def published_md5(source: str) -> str | None:
    """The MD5 that is published for a file; None where there is none. Zenodo is asked for its own.

    Raises:
        ValueError: Zenodo does not list the file.
    """
    found = _ZENODO_FILE.fullmatch(source)
    if found is None:
        return _MD5.get(source.rsplit("/", 1)[1])
    record, name = found.groups()
    with urlopen(f"https://zenodo.org/api/records/{record}", timeout=30) as reply:
        listed = {file["key"]: file["checksum"] for file in json.load(reply)["files"]}
    if not listed.get(name, "").startswith("md5:"):
        raise ValueError(
            f"https://zenodo.org/record/{record} lists no MD5 of {name}; fetch {source} by hand"
        )
    return str(listed[name].removeprefix("md5:"))
