"""The README's Python examples run as they are printed."""

import re
import warnings
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_an_example_for_each_door():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("source", EXAMPLES, ids=["drop-in", "batched", "fused"])
def test_example_runs_and_trains(source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = {}
        exec(compile(source, "README.md", "exec"), names)
    for p in names["maml"].parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
    assert any(p.grad.abs().max() > 0 for p in names["maml"].parameters())
