"""How kernels are launched, and how those of a whole call are compiled before it, side by side.

Triton compiles a kernel when it is first launched, while everything waits: half a second for each
of the several dozen of a network.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import triton
from triton.compiler import ASTSource
from triton.runtime import driver

_OPTIONS = {"enable_fp_fusion": True}  # of multiply-adds; Triton's default is about to change
_Variant = tuple[ASTSource, dict[str, Any]]  # with the options that it is compiled with

# What the present thread would have had to compile; None where it launches.
_found: ContextVar[dict[Any, _Variant] | None] = ContextVar("_found", default=None)
_HOOK = threading.Lock()  # of which Triton has one


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``, but within :func:`compiled_beforehand`."""
    run = kernel[grid] if _found.get() is None else partial(kernel.warmup, grid=grid)
    return partial(run, **_OPTIONS)


@contextmanager
def compiled_beforehand() -> Iterator[None]:
    """Nothing that is launched within is run. What has not been compiled is in the end, and kept
    on disk, where Triton finds it when it is launched.
    """
    found: dict[Any, _Variant] = {}
    with _HOOK:
        runtime, token = triton.knobs.runtime, _found.set(found)
        before, runtime.jit_cache_hook = runtime.jit_cache_hook, _noting(runtime.jit_cache_hook)
        try:
            yield
        finally:
            runtime.jit_cache_hook = before
            _found.reset(token)
    _compile(list(found.values()))


def _noting(before: Callable[..., bool | None] | None) -> Callable[..., bool | None]:
    """Called by Triton before it compiles; True: it does not."""

    def note(**given: Any) -> bool | None:
        found = _found.get()
        if found is None:  # another thread's
            return None if before is None else before(**given)
        kernel, how = given["fn"].jit_function, given["compile"]
        source = ASTSource(kernel, how["signature"], how["constants"], how["configs"][0])
        options = {name: how[name] for name in ("num_warps", "num_stages", *_OPTIONS)}
        found.setdefault((kernel, how["key"]), (source, options))
        return True

    return note


def _compile(variants: Sequence[_Variant]) -> None:
    if not variants:
        return
    target = driver.active.get_current_target()

    def compile_one(variant: _Variant) -> None:
        source, options = variant
        with suppress(Exception):  # it will be raised where the kernel is launched
            compiled = triton.compile(source, target=target, options=options)
            driver.active.launcher_cls(compiled.src, compiled.metadata)  # up to 3.6 it is C

    for source, _ in variants:
        source.hash()  # reads kernels' sources, of which threads would be in each other's way
    with ThreadPoolExecutor(min(len(variants), os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, variants))
