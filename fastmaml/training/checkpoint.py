"""Runs on disk: one file that is always whole."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastmaml.files import write_atomically
from fastmaml.training.recipe import Recipe, load_data
from fastmaml.training.trainer import Trainer

FORMAT = "fastmaml checkpoint 1"
_OTHER_VERSION = "was not written by this version of fastmaml; go on with the one that wrote it"


def save_checkpoint(path: str | Path, trainer: Trainer) -> None:
    """Write the run to `path`: a crash leaves the old file or the new one, never half of one."""
    content = {
        "format": FORMAT,
        "recipe": asdict(trainer.recipe),
        "root": None if trainer.root is None else str(Path(trainer.root).absolute()),
        "state": trainer.state(),
    }
    archive = io.BytesIO()  # torch's own writer reports a full disk as a position that is wrong
    torch.save(content, archive)
    write_atomically(path, lambda file: file.write(archive.getbuffer()))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, with `"recipe"` as a `Recipe`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is something else.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"checkpoint {path} does not exist; `fastmaml train ... --checkpoint {path}` writes it"
        )
    if not _is_whole_archive(path):
        raise ValueError(f"{path} must be a fastmaml checkpoint, got another or a damaged file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:  # torch's own advice would mislead
        raise ValueError(
            f"{path} must be a fastmaml checkpoint, got another or a damaged file"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} must be a fastmaml checkpoint ({FORMAT!r}), got another file")
    try:
        content["recipe"] = Recipe(**content["recipe"])
    except TypeError as error:
        raise ValueError(f"{path} {_OTHER_VERSION}: {error}") from error
    return content


def _is_whole_archive(path: str | Path) -> bool:
    """torch.load has a legacy reader, which fails in many ways, and looks at no checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except PermissionError:
        raise
    except Exception:  # damaged files raise nearly anything
        return False


def load_checkpoint(
    path: str | Path, root: str | Path | None = None, device: torch.device | str = "cpu"
) -> Trainer:
    """The trainer that `path` holds, ready to go on; `root` overrides where its data set is.

    Raises:
        FileNotFoundError: the checkpoint, or the data set, is not there.
        ValueError: the file is no checkpoint, or one of another version.
    """
    content = read_checkpoint(path)
    recipe: Recipe = content["recipe"]
    root = root or content["root"]
    trainer = Trainer(recipe, *load_data(recipe.dataset, recipe.seed, root), root, device)
    try:
        trainer.load_state(content["state"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} {_OTHER_VERSION}: {error!r}") from error
    return trainer
