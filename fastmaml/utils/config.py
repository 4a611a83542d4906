"""Configurations and warnings of scripts."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from typing import Any

_warned: set[str] = set()
_SEVERITIES: dict[str | None, type[Warning]] = {
    None: UserWarning,
    "default": UserWarning,
    "deprecation": DeprecationWarning,
}


def flatten_config(args: Any, prefix: str | None = None) -> dict[str | None, Any]:
    """Nested namespaces, dataclasses and dicts as one flat dict with dotted names.

    ``{"model": {"layers": 4}}`` gives ``{"model.layers": 4}``; anything else is the single entry
    ``{prefix: args}``.
    """
    if isinstance(args, argparse.Namespace):
        items = vars(args)
    elif dataclasses.is_dataclass(args) and not isinstance(args, type):
        items = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    elif isinstance(args, dict):
        items = args
    else:
        return {prefix: args}
    flat: dict[str | None, Any] = {}
    for name, value in items.items():
        flat |= flatten_config(value, str(name) if prefix is None else f"{prefix}.{name}")
    return flat


def warn_once(message: str, severity: str | type[Warning] | None = None) -> None:
    """Warn, the first time that this message comes in this process.

    Args:
        severity: None or ``"default"`` (UserWarning), ``"deprecation"``, ``"error"``, or a
            category of warnings.

    Raises:
        RuntimeError: the severity is ``"error"``.
        ValueError: the severity is none of these.
    """
    if severity == "error":
        raise RuntimeError(message)
    if severity is not None and not isinstance(severity, str):
        category = severity
    elif severity in _SEVERITIES:
        category = _SEVERITIES[severity]
    else:
        raise ValueError(
            "severity must be None, 'default', 'deprecation', 'error' or a warning category, "
            f"got {severity!r}"
        )
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, category, stacklevel=2)
