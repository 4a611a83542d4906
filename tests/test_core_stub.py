"""The type stub of the native core says what the core has."""

import ast
import re
from pathlib import Path

import pytest

import fastmaml
from fastmaml import _core

STUB = ast.parse((Path(fastmaml.__file__).parent / "_core.pyi").read_text())
FUNCTIONS = [node for node in STUB.body if isinstance(node, ast.FunctionDef)]
VALUES = [node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)]
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def members(node):
    return {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}


def arguments(function):
    return [a.arg for a in function.args.args + function.args.kwonlyargs]


def documented_arguments(method):
    """The argument names in the signature that pybind11 writes into the docstring."""
    signature = method.__doc__.splitlines()[0]
    return re.findall(r"(\w+): ", signature)


def test_the_stub_has_every_public_name():
    assert {f.name for f in FUNCTIONS} | {*CLASSES, *VALUES} == {
        name for name in vars(_core) if not name.startswith("_")
    }


@pytest.mark.parametrize("name", ["Program", "EpisodeDrawer", "Stream", "DeviceKernels", "Mlp"])
def test_the_stub_has_every_method_with_its_arguments(name):
    native = getattr(_core, name)
    declared = members(CLASSES[name])
    public = {name for name in vars(native) if not name.startswith("_")}
    assert public | {"__init__"} == {*declared, "__init__"}
    for name, function in declared.items():
        method = getattr(native, name)
        if callable(method):
            assert arguments(function) == documented_arguments(method), name
