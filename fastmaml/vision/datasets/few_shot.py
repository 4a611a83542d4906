"""What the few-shot data sets share: modes, transforms, and files that may be missing."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

MODES = ("train", "validation", "test")
Transform = Callable[[Any], Any]


class FewShotImages(Dataset):
    """Images with the number of their class, under learn2learn's conventions.

    Subclasses fill ``samples``, pairs of a source and a class, and say how a source is opened.

    Args:
        root: the folder of all data.
        mode: ``"train"``, ``"validation"`` or ``"test"``, each with classes of its own; some data
            sets also have ``"all"``.
        transform: applied to an image when it is asked for.
        target_transform: applied to its class.
        download: fetch what is missing.

    Raises:
        ValueError: there is no such mode; a file is damaged.
        FileNotFoundError: a file is missing and ``download`` is off; the message says which, where
            it comes from, and the command that fetches it.
    """

    name: str  # for messages and the bookkeeping file, as `fastmaml data` knows it
    modes: Sequence[str] = MODES

    def __init__(
        self,
        root: str | Path,
        mode: str = "train",
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
    ) -> None:
        if mode not in self.modes:
            raise ValueError(f"mode must be one of {', '.join(self.modes)}, got {mode!r}")
        self.root = str(Path(root).expanduser())
        self.mode = mode
        self.transform = transform
        self.target_transform = target_transform
        self._bookkeeping_path: str | None = str(
            Path(self.root) / f"{self.name}-bookkeeping-{mode}.pkl"
        )
        self.samples: Sequence[tuple[Any, int]] = self._load(Path(self.root), download)
        if not len(self.samples):
            raise ValueError(f"{self.name}: there are no images of mode {mode} in {self.root}")

    def _load(self, root: Path, download: bool) -> Sequence[tuple[Any, int]]:
        raise NotImplementedError

    def _open(self, source: Any) -> Any:
        with Image.open(source) as image:
            return image.convert("RGB")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        source, label = self.samples[index]
        try:
            image = self._open(source)
        except Exception as error:  # damaged files raise nearly anything
            raise ValueError(
                f"{self.name}: {source if isinstance(source, str) else f'image {index}'} cannot be "
                f"read ({error!r}); delete what is damaged and fetch the data again with "
                f"`{self.command}`"
            ) from error
        if self.transform is not None:
            image = self.transform(image)
        return image, label if self.target_transform is None else self.target_transform(label)

    def known_labels(self) -> list[Any]:
        """The class of every image, without opening any."""
        change = self.target_transform
        return [label if change is None else change(label) for _, label in self.samples]

    def class_sizes(self) -> list[int]:
        """The number of images of each class that has any."""
        return list(Counter(label for _, label in self.samples).values())

    @property
    def command(self) -> str:
        """What fetches the data."""
        return f"fastmaml data {self.name} --root {self.root} --download"

    def require(self, path: Path, source: str, unpacked: Path | None = None) -> None:
        """Raise where ``path`` is missing, naming what to do.

        Args:
            unpacked: the folder that the archive ``source`` is unpacked to, which is not fetched
                again while it is there.
        """
        if not path.exists():
            first = "" if unpacked is None or not unpacked.exists() else f"delete {unpacked}, then "
            raise FileNotFoundError(
                f"{self.name}: {path} is missing; it comes from {source}, and {first}"
                f"`{self.command}` fetches it"
            )

    def listed(self, folder: Path, pattern: str, source: str, unpacked: Path) -> list[str]:
        """The images of a class, which is a folder; see :meth:`require` for the arguments.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it is empty.
        """
        self.require(folder, source, unpacked)
        files = sorted(str(file) for file in folder.glob(pattern))
        if not files:
            raise ValueError(
                f"{self.name}: the folder of a class, {folder}, must hold images {pattern}, got "
                f"none; they come from {source}: delete {unpacked}, then `{self.command}` fetches "
                "them"
            )
        return files


class MetaDatasetImages(FewShotImages):
    """Images split by classes as in Meta-Dataset; also ``mode="all"``, the default: all classes.

    Triantafillou et al., "Meta-Dataset", ICLR 2020.
    """

    modes = (*MODES, "all")

    def __init__(
        self,
        root: str | Path,
        mode: str = "all",
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, mode, transform, target_transform, download)


@lru_cache
def meta_dataset_splits() -> dict[str, Any]:
    """Which classes are for training, validation and testing, by data set.

    Triantafillou et al., "Meta-Dataset", ICLR 2020.
    """
    path = Path(__file__).with_name("meta_dataset_splits.json")
    contents: dict[str, Any] = json.loads(path.read_text())
    return contents


def chosen_classes(data_set: str, mode: str) -> list[Any]:
    """The classes of a mode in order, which is their numbering."""
    splits = meta_dataset_splits()[data_set]
    return [c for m in (MODES if mode == "all" else (mode,)) for c in splits[m]]


@contextmanager
def reading(path: Path, unpacked: Path | None = None) -> Iterator[None]:
    """While a file is read and taken apart: names it where it is damaged.

    Args:
        unpacked: what is to be deleted so that it is fetched again; None: the file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(
            f"{path} is damaged ({error!r}); delete {unpacked or 'it'} and fetch it again"
        ) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays, and runs no other code."""

    _ALLOWED = frozenset(
        {
            ("_codecs", "encode"),
            ("collections", "OrderedDict"),
            ("collections", "defaultdict"),
            ("builtins", "list"),
            ("__builtin__", "list"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy.core.numeric", "_frombuffer"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a data set")


def read_pickle(path: Path, encoding: str = "ASCII") -> Any:
    """The contents of a published pickle; only arrays and plain values are accepted.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    with reading(path), path.open("rb") as file:
        return _ArrayUnpickler(file, encoding=encoding).load()
