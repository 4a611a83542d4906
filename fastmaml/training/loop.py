"""The meta-training loop: progress, validation, checkpoints, and a clean stop."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm

from fastmaml.training.reading import Reading
from fastmaml.training.trainer import DivergedError, Trainer

MEASURE_EVERY = 20
Handler = Any  # of a signal: a function or a number
_HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Which signal asked for a stop, if any."""

    signal: int | None = None


def train(
    trainer: Trainer,
    iterations: int | None,
    *,
    seconds: float | None = None,
    save: Callable[[], None] | None = None,
    save_every: int = 500,
    validate_every: int = 0,
    validation_tasks: int = 100,
    progress: bool = True,
) -> int | None:
    """Advance `trainer` to `iterations` meta-updates in all.

    `save` is called every `save_every` updates, at the end, on Ctrl-C, SIGTERM or SIGHUP, and on a
    crash that leaves the trainer whole and further than it was. The signals let the update in hand
    finish; a second Ctrl-C or SIGTERM stops at once and keeps the last checkpoint. All wait while
    `save` runs.

    Args:
        trainer: the run; its history gets a point at each validation.
        iterations: the number to reach, counted from the very start of the run; None: no limit.
        seconds: stop after this long (results then depend on the machine's speed).
        save: writes a checkpoint.
        save_every: updates between checkpoints.
        validate_every: updates between validations; 0 for none.
        validation_tasks: tasks of a validation.
        progress: show a progress bar on stderr.

    Returns:
        The signal that stopped the run early, or None.

    Raises:
        DivergedError: the meta-loss is infinite or NaN; the last checkpoint is kept.
        KeyboardInterrupt: Ctrl-C was pressed a second time.
    """
    save = None if save is None else _undisturbed(save)
    start = trainer.iteration
    deadline = time.monotonic() + seconds if seconds is not None else float("inf")
    with _catch_signals() as stop, _Bar(trainer, iterations, progress) as bar:
        try:
            while not _reached(trainer, iterations) and time.monotonic() < deadline:
                measure = trainer.iteration % MEASURE_EVERY == 0
                bar.update(*trainer.step(measure))
                if validate_every and trainer.iteration % validate_every == 0:
                    bar.validated(trainer.validate(validation_tasks).after.mean)
                if save and trainer.iteration % save_every == 0:
                    save()
                if stop.signal is not None:
                    break
            trainer.require_finite()
        except DivergedError:
            raise
        except Exception:
            if save and trainer.whole and trainer.iteration > start:
                save()
            raise
    if save:
        save()
    return stop.signal


def _reached(trainer: Trainer, iterations: int | None) -> bool:
    return iterations is not None and trainer.iteration >= iterations


@contextmanager
def _catch_signals() -> Iterator[StopRequest]:
    """Turn the first signal into a request."""
    stop = StopRequest()

    def request(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        # a terminal that goes sends SIGHUP more than once: the shell does, and the system
        _set_handlers({n: old for n, old in previous.items() if n != signal.SIGHUP})

    previous = _heeded()
    _set_handlers(dict.fromkeys(previous, request))
    try:
        yield stop
    finally:
        _set_handlers(previous)


def _undisturbed(save: Callable[[], None]) -> Callable[[], None]:
    """``save``, during which signals wait: an interrupted one would be lost, and fail in torch."""

    def whole() -> None:
        waiting: list[int] = []
        previous = _heeded()
        _set_handlers(dict.fromkeys(previous, lambda number, _: waiting.append(number)))
        try:
            save()
        finally:
            _set_handlers(previous)
            for number in waiting:
                signal.raise_signal(number)

    return whole


def _heeded() -> dict[signal.Signals, Handler]:
    """The handlers of these signals, unless the process ignores them or a thread asks."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {number: signal.getsignal(number) for number in _HEEDED}
    return {n: old for n, old in handlers.items() if old not in (None, signal.SIG_IGN)}


def _set_handlers(handlers: Mapping[signal.Signals, Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


class _Bar:
    """A progress bar with the smoothed meta-loss and query accuracy."""

    def __init__(self, trainer: Trainer, iterations: int | None, show: bool) -> None:
        self._bar = tqdm(
            total=iterations,
            initial=trainer.iteration,
            disable=not show,
            unit="it",
            mininterval=0.2 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )
        self._shown: dict[str, float] = {}
        self._awaited: deque[tuple[Reading, Reading | None]] = deque()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, loss: Reading, accuracy: Reading | None) -> None:
        self._awaited.append((loss, accuracy))
        while self._awaited and (self._awaited[0][1] or self._awaited[0][0]).is_there:
            self._show(*self._awaited.popleft())
        self._bar.update()

    def _show(self, loss: Reading, accuracy: Reading | None) -> None:
        self._smooth("loss", float(loss), 0.02)
        if accuracy is not None:
            self._smooth("query accuracy", 100 * float(accuracy), 0.2)
        text = {name: f"{value:.3f}" for name, value in self._shown.items() if name == "loss"}
        text |= {name: f"{value:.1f}%" for name, value in self._shown.items() if name != "loss"}
        self._bar.set_postfix(text, refresh=False)

    def validated(self, accuracy: float) -> None:
        self._shown["validation"] = 100 * accuracy

    def _smooth(self, name: str, value: float, weight: float) -> None:
        old = self._shown.get(name, value)
        self._shown[name] = old + weight * (value - old)
