"""Makes the pretended GPU this process's."""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType

import torch

from gpu_on_host.build import OPERATORS


def install() -> None:
    torch.cuda.init()
    operators = _operators()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel")
        operators.install()
    torch.backends.cudnn.enabled = False
    from gpu_on_host import attention, core_kernels, triton_kernels

    attention.install()
    core_kernels.install(operators)
    triton_kernels.install(operators)


def _operators() -> ModuleType:
    spec = importlib.util.spec_from_file_location(OPERATORS.stem, OPERATORS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
