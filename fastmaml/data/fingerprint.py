"""What a data set is made of, as one number: packed files are kept under it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset


class Fingerprint:
    """Changes with the arrays, numbers and texts a data set holds, with its transforms, and with
    the size and times of the files it names. Objects of other kinds count by their type alone.

    Attributes:
        files: how many files have been named.
        values: how many elements the arrays have had.
    """

    def __init__(self) -> None:
        self.files = self.values = 0
        self._digest = hashlib.blake2b(digest_size=8)
        self._seen: dict[int, tuple[int, object]] = {}  # also keeps what has an id alive

    def __str__(self) -> str:
        return self._digest.hexdigest()

    def add(self, value: object) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray) and value.dtype != object:
            self.values += value.size
            self._write(value.shape, value.dtype.str)
            self._digest.update(np.ascontiguousarray(value).data)
        elif isinstance(value, (str, Path)):
            self._add_file(str(value))
        elif isinstance(value, (int, float, complex, bytes, type(None), np.generic)):
            self._write(value)
        else:
            self._write(type(value).__qualname__)
            self._add_inside(value)

    def add_folder(self, root: str | os.PathLike[str]) -> None:
        """Every file below a folder."""
        for folder, inner, files in os.walk(root):
            inner.sort()
            for name in sorted(files):
                self._add_file(os.path.join(folder, name))

    def _add_file(self, path: str) -> None:
        state = _size_and_times(path)
        self.files += bool(state)
        self._write(path, *state)

    def _add_inside(self, value: object) -> None:
        if id(value) in self._seen:
            self._write(self._seen[id(value)][0])
            return
        self._seen[id(value)] = (len(self._seen), value)
        for part in _parts(value):
            self.add(part)

    def _write(self, *parts: object) -> None:
        self._digest.update(repr(parts).encode())


def _parts(value: Any) -> list[object]:
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, FunctionType):
        code = value.__code__
        return [value.__qualname__, code.co_code, code.co_names, code.co_consts]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (Dataset, nn.Module)) or type(value).__module__.startswith("torchvision."):
        return [part for item in vars(value).items() for part in item]
    return []


def _size_and_times(path: str) -> tuple[int, ...]:
    """Empty where this is no file. What is written changes a time that no program can set back."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    if not stat.S_ISREG(status.st_mode):
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
