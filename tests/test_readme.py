"""The README's Python examples run as they are printed."""

import re
import warnings
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


NAMES = ["drop-in", "batched", "fused", "episodes"]


def test_there_is_an_example_for_each_door_and_for_episodes():
    assert len(EXAMPLES) == len(NAMES)


def run(source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = {}
        exec(compile(source, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("source", EXAMPLES[:3], ids=NAMES[:3])
def test_example_runs_and_trains(source):
    maml = run(source)["maml"]
    for p in maml.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
    assert any(p.grad.abs().max() > 0 for p in maml.parameters())


def test_the_example_of_episodes_draws_a_batch():
    batch = run(EXAMPLES[3])["batch"]
    assert batch.support_x.shape == (32, 5, 1, 28, 28)
    assert batch.query_y.shape == (32, 25)
