"""``torch.compile`` around a training loop: what is ours runs between the graphs of the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def left_alone(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function``, which with all that it calls is native already and is not to be traced.

    Unlike ``torch.compiler.disable`` itself, this does not load the compiler for those who do not
    compile.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            result: Result = torch.compiler.disable(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call
