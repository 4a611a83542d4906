"""Files that a crash cannot break."""

import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from glyph_runs import RECIPE, make_data
from torch.utils.data import TensorDataset

from fastmaml.data import pack
from fastmaml.files import cache_directory, require_writable, write_atomically
from fastmaml.training import Trainer, save_checkpoint
from fastmaml.vision import glyphs


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new folder" / "file"
    write_atomically(path, lambda file: file.write(b"old"))
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half(file):
        file.write(b"ne")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    require_writable(tmp_path / "new folder" / "file")
    assert os.listdir(tmp_path / "new folder") == []
    with pytest.raises(OSError, match=r"/dev/null/x cannot be written: .*; name another file"):
        require_writable("/dev/null/x")
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        require_writable(tmp_path)


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def look(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, look)
    assert path.read_bytes() == b"new"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMAML_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("FASTMAML_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "fastmaml"


def homeless():
    raise RuntimeError("Could not determine home directory.")


def test_no_home_is_no_cache(monkeypatch):
    for name in ("FASTMAML_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda: "drawn")
    assert cache_directory() is None
    assert glyphs.load_glyphs() == "drawn"


@pytest.fixture
def little_room():
    """Files may have 4096 bytes, as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_with_the_file(tmp_path, little_room):
    checkpoint, data = tmp_path / "run.pt", TensorDataset(torch.ones(40, 900), torch.zeros(40))
    with pytest.raises(OSError, match=r"File too large: .*run\.pt"):
        save_checkpoint(checkpoint, Trainer(RECIPE, *make_data()))
    with pytest.raises(OSError, match=r"too large: the packed file needs more room; .*TensorDat"):
        pack(data, cache=tmp_path, progress=False)
    assert os.listdir(tmp_path) == [".lock"]
