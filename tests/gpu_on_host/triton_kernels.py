"""Triton for the pretended GPU: kernels are compiled as for one, and run by the interpreter."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.language import math, standard
from triton.runtime import driver, interpreter
from triton.runtime.jit import JITFunction

_SHARED_MEMORY = 227 << 10
_BY_HAND = {name: f"{name} by hand" for name in ("bf16", "tf32")}  # see products.dot
_ONE_AT_A_TIME = threading.RLock()  # the interpreter keeps its place in globals


_INTERPRETED: dict[JITFunction, Any] = {}


def _interpreted(kernel: JITFunction) -> Any:
    """``kernel``, with all that it calls."""
    if kernel in _INTERPRETED:
        return _INTERPRETED[kernel]
    fn, names = kernel.fn, {}
    twin = FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__annotations__, twin.__module__ = fn.__annotations__, fn.__module__
    made = _INTERPRETED[kernel] = interpreter.InterpretedFunction(twin)  # its module names it too
    for name, value in fn.__globals__.items():
        names[name] = _interpreted(value) if isinstance(value, JITFunction) else value
    return made


@cache
def _library() -> list[tuple[Any, str, Any, Any]]:
    """Triton's own functions, which are compiled as well."""
    return [
        (module, name, value, _interpreted(value))
        for module in (tl, tl.core, math, standard)
        for name, value in list(vars(module).items())
        if isinstance(value, JITFunction)
    ]


@contextmanager
def _language_interpreted() -> Iterator[None]:
    """Only while a kernel runs: it could not be compiled then."""
    with _ONE_AT_A_TIME:
        library = _library()  # before anything in it is replaced
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        for module, name, _, instead in library:
            setattr(module, name, instead)
        try:
            yield
        finally:
            for module, name, before, _ in library:
                setattr(module, name, before)
            scope.restore()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of one interpreted function by another: the language has been seen to."""
    return self.rewrite()(*args, **kwargs)


class _Launcher:
    def __init__(self, operators: Any, source: Any) -> None:
        kernel = source.fn
        self._kernel = kernel if isinstance(kernel, JITFunction) else kernel.jit_function
        self._operators, self._signature = operators, source.signature

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: int, packed: Any, metadata: Any,
        enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        if max(y, z) >= 1 << 16 or x >= 1 << 31:
            raise ValueError(f"a grid must have at most 2^31 x 65535 x 65535 blocks: {x, y, z}")
        names = self._kernel.arg_names
        given = [self._given(*pair) for pair in zip(names, arguments, strict=True)]
        kernel = _interpreted(self._kernel)

        def run() -> None:
            with _language_interpreted():
                kernel[x, y, z](*given)

        self._operators.enqueue(stream, run)

    def _given(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.device.index != torch.cuda.current_device():
                raise ValueError(f"{self._kernel.__name__}: {name} is on {value.device}")
            return self._operators.on_host(value)
        if isinstance(value, JITFunction):
            return _interpreted(value)
        if self._signature[name] == "i32" and not -(1 << 31) <= value < 1 << 31:
            raise OverflowError(f"{self._kernel.__name__}: {name} does not fit into 32 bits")
        return _BY_HAND.get(value, value) if name == "PRECISION" else value


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        if shared > _SHARED_MEMORY:
            raise ValueError(f"{name} takes {shared} bytes of shared memory")
        return 0, 0, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_MEMORY, "max_num_regs": 1 << 16, "warpSize": 32}


class _Driver(GPUDriver):
    def __init__(self, operators: Any) -> None:
        super().__init__()
        self.utils = _Utils()
        self.launcher_cls = lambda source, metadata: _Launcher(operators, source)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is worth timing here")


def install(operators: Any) -> None:
    interpreter.InterpretedFunction.__call__ = _call
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)  # takes a third of the time
    driver.set_active(_Driver(operators))
