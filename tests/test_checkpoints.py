"""The files of a training run: whole or refused, never half written."""

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from glyph_runs import RECIPE, make_data

from fastmaml.training import Trainer, load_checkpoint, save_checkpoint
from fastmaml.training import checkpoint as checkpoint_module


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.setattr(checkpoint_module, "load_data", lambda *_: make_data())
    return Trainer(RECIPE, *make_data())


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, trainer, monkeypatch):
    path = tmp_path / "run.pt"
    save_checkpoint(path, trainer)
    trainer.step()
    real = torch.save

    def half(content, file):
        file.write(b"PK\x03\x04 half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, trainer)
    monkeypatch.setattr(torch, "save", real)
    assert load_checkpoint(path).iteration == 0
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_link_to_a_checkpoint_stays(tmp_path, trainer):
    (tmp_path / "large").mkdir()
    link, file = tmp_path / "run.pt", tmp_path / "large" / "run.pt"
    link.symlink_to(Path("large") / "run.pt")
    for iteration in (0, 1):
        save_checkpoint(link, trainer)
        assert link.is_symlink()
        assert load_checkpoint(file).iteration == iteration
        trainer.step()
    assert os.listdir(file.parent) == ["run.pt"]


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist; `fastmaml train"):
        load_checkpoint(tmp_path / "none.pt")


def deflated_without_a_stream() -> bytes:
    """An archive of one stored file that one flipped bit declares to be deflated."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"\xff" * 20)
    content = bytearray(file.getvalue())
    content[content.index(b"PK\x01\x02") + 10] = zipfile.ZIP_DEFLATED
    return bytes(content)


@pytest.mark.parametrize("content", [b"", b"something else", deflated_without_a_stream(), None])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "other.pt"
    if content is None:
        torch.save({"weights": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pt must be a fastmaml checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"recipe": {"dataset": "glyphs", "novelty": 1}}, "unexpected keyword argument 'novelty'"),
        ({"state": {}}, "KeyError"),
    ],
)
def test_a_checkpoint_of_another_version(tmp_path, trainer, damage, message):
    path = tmp_path / "run.pt"
    save_checkpoint(path, trainer)
    torch.save(torch.load(path, weights_only=True) | damage, path)
    with pytest.raises(ValueError, match=rf"not written by this version of fastmaml.*{message}"):
        load_checkpoint(path)


def test_a_checkpoint_of_a_machine_with_more_gpus(tmp_path, trainer, monkeypatch):
    path, seeded = tmp_path / "run.pt", []
    save_checkpoint(path, trainer)
    content = torch.load(path, weights_only=True)
    content["state"]["random"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 3
    torch.save(content, path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: seeded.append(device))
    assert load_checkpoint(path).iteration == 0
    assert seeded == [0, 1]


def test_a_flipped_bit_is_found(tmp_path, trainer):
    path = tmp_path / "run.pt"
    save_checkpoint(path, trainer)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.pt must be .* got another or a damaged file"):
        load_checkpoint(path)


def test_a_model_is_no_checkpoint(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"must be a fastmaml checkpoint, got another") as caught:
        load_checkpoint(tmp_path / "model.pt")
    assert "weights_only" not in str(caught.value)
