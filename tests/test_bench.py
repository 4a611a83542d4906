"""The benchmark suite's own honesty: its gate, its flop counts, its report."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("bench", reason="the benchmarks lie outside the package")

from bench import compare, episodes, family, launches, report
from bench.cases import CASES, oracle, useful_gflop
from bench.run import busy_processes, percentiles
from bench.worker import Job, _prepare

SMALL = {"tasks": 2, "support": 5, "query": 5, "steps": 1}


def gate_of(contender):
    job = Job(contender, "omnifc", SMALL)
    return _prepare(job, oracle(CASES["omnifc"].resized(**SMALL)))[1]


@pytest.mark.parametrize("contender", ["eager", "vmap-norm", "door1", "door2", "door3"])
def test_a_right_gradient_passes_the_gate(contender):
    gate = gate_of(contender)
    assert gate.status == "ok", gate.reason
    assert gate.error64 < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("contender", ["eager", "vmap-norm", "door3", "door3-in-graph"])
def test_a_right_gradient_passes_the_gate_on_a_gpu(contender):
    job = Job(contender, "sine", {"tasks": 2}, device="cuda")
    gate = _prepare(job, oracle(job.sized_case()))[1]
    assert gate.status == "ok", gate.reason


def test_a_wrong_gradient_does_not():
    gate = gate_of("vmap")  # torch.func.vmap over the fused batch norm
    assert gate.status == "wrong"
    assert gate.error64 > 1e-5
    assert "float64" in gate.reason


def test_useful_flop_leave_out_padding_and_what_the_data_does_not_need():
    # conv taps that read pixels, by hand: 41, 20, 10 and 5 of 42, 21, 12 and 6 per axis
    conv = [41**2 * 64, 20**2 * 64 * 64, 10**2 * 64 * 64, 5**2 * 64 * 64]
    first, later = 2 * conv[0], 2 * (sum(conv[1:]) + 64 * 5)
    expected = 32 * (first * (5 * 2 + 5 * 2 + 5 * 2) + later * (5 * 3 + 5 * 3 + 5 * 6)) / 1e9
    assert useful_gflop(CASES["omni51"]) == pytest.approx(expected)


def test_useful_flop_of_recurrent_layers_and_transformers():
    """Of 16 places: products with the data, and all others of an example."""
    lstm = 16 * 2 * 4 * 32 * 8, 16 * 2 * 4 * 32 * 32 + 2 * 32 * 5
    layer = 16 * 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64) + 2 * (2 * 16 * 16 * 32)
    encoder = 16 * 2 * 8 * 32, 2 * layer + 2 * 16 * 32 * 5
    for name, (first, later) in (("lstm", lstm), ("encoder", encoder)):
        expected = 16 * (first * (30 * 2 + 15 * 2) + later * (30 * 3 + 15 * 6)) / 1e9
        assert useful_gflop(CASES[name]) == pytest.approx(expected)


def test_percentiles_are_of_all_samples():
    found = percentiles([0.1, 0.3, 0.2, 0.5, 0.4, 0.6])
    assert found["p50_s"] == pytest.approx(0.35)
    assert found["p20_s"] < found["p50_s"] < found["p80_s"]
    assert percentiles([]) == {"samples": 0}


def test_the_report_shows_wrong_contenders_without_a_time(tmp_path):
    machine = {
        "threads": 2, "cpu": "a processor", "isa": "avx2", "peak_gflops": 100.0,
        "torch": "2", "peers": {}, "commit": "abc",
    }  # fmt: skip
    common = {"case": "sine", "environment": machine}
    records = [
        {**common, "contender": "door3", "status": "ok", "p50_s": 1e-4, "peak_fraction": 0.5},
        {**common, "contender": "eager", "status": "ok", "p50_s": 0.02, "peak_fraction": 0.01},
        {**common, "contender": "vmap", "status": "wrong", "reason": "off"},
        {**common, "contender": "higher", "status": "unavailable", "reason": "not installed"},
    ]
    source = report.RESULTS / "run-x.jsonl"
    text = report.table([json.loads(json.dumps(r)) for r in records], source)
    assert "| torch.func vmap, as written | wrong |" in text
    assert "higher" not in text
    assert "| **door 3 over clone/adapt loop** | **200×** |" in text
    assert "50 %" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.insert(readme, text)
    assert readme.read_text() == f"before\n{report.START}\n{text}\n{report.END}\nafter\n"


@pytest.mark.parametrize(
    ("write", "engine", "expected"),
    [(9000.0, 10.0, 4000.0), (3000.0, 10.0, 2000.0), (3e3, 900.0, 9e3)],
)
def test_the_goal_of_the_sampler(write, engine, expected):
    by_name = {"fastmaml, turned": 3999.0, "write": write, "learn2learn": 100.0}
    assert episodes.goal(by_name, engine) == expected
    for rate, reached in ((expected, True), (expected - 1, False)):
        measured = {"omni51": {"engine": engine}, "5-way": by_name | {"fastmaml, turned": rate}}
        (verdict,) = episodes.rate_verdicts("5-way", measured)
        assert verdict.reached == reached
        assert str(verdict).startswith("reached" if reached else "MISSED")
        assert f"{expected:,.4g} wanted" in str(verdict)


def test_the_engine_must_not_wait_for_the_sampler():
    for fed, reached in ((96.0, True), (94.0, False)):
        measured = {"omni51": {"engine": 100.0, "engine, fed": fed}}
        (verdict,) = episodes.rate_verdicts("omni51", measured)
        assert verdict.reached == reached
    at_most = episodes.Verdict("waiting", 5.0, 4.0, "us", at_most=True)
    assert not at_most.reached
    assert at_most._replace(measured=3.0).reached


def test_every_sampler_of_the_benchmark_draws_the_same_amount():
    pixels = torch.randint(256, (120, 1, 4, 4), dtype=torch.uint8)
    contenders = episodes.sampler_contenders(pixels, torch.arange(120) // 20, 5, 2)
    for name, run in contenders.items():
        drawn = run()
        if name.startswith("fastmaml"):
            elements = drawn.support_x.numel() + drawn.query_x.numel()
        else:
            elements = (
                sum(x.numel() for x, _ in drawn) if isinstance(drawn, list) else drawn.numel()
            )
        assert elements == 32 * 5 * 2 * 16, name


def test_packing_and_drawing_take_the_packed_data_and_one_batch():
    pixels = torch.randint(256, (20_000, 1, 40, 40), dtype=torch.uint8)
    verdict = episodes.memory_verdict(pixels, torch.arange(len(pixels)) // 20)
    batch = 32 * 5 * 16 * 1600 * 4
    assert verdict.wanted == pytest.approx(1.1 * (pixels.nbytes + batch) / 2**20, rel=1e-3)
    assert verdict.reached, str(verdict)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # learn2learn's
def test_the_benchmark_of_episodes_records_rates_and_verdicts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(episodes, "CLASSES", 20)
    monkeypatch.setattr(episodes, "TASKS", 2)
    tiny = CASES["omni51"].resized(tasks=2)
    monkeypatch.setattr(episodes, "CASES", {"omni51": tiny})
    parser = argparse.ArgumentParser()
    episodes.add_arguments(parser)
    output = tmp_path / "episodes.jsonl"
    options = ["--rounds", "1", "--budget", "1e-4", "--threads", "1", "--output", str(output)]
    code = episodes.main(parser.parse_args(options))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    verdicts = [line for line in lines if "claim" in line]
    assert code == (0 if all(line["reached"] for line in verdicts) else 1)
    assert capsys.readouterr().out.count(" wanted\n") == len(verdicts) == 3 + 3 * 3
    rates = {(line["size"], line["contender"]) for line in lines if "size" in line}
    for size in ("5-way 2-image", "20-way 2-image", "5-way 16-image"):
        assert len({contender for own, contender in rates if own == size}) == 5
    assert {contender for own, contender in rates if own == "omni51"} == {"engine", "engine, fed"}
    assert all(line["environment"]["threads"] == 1 for line in lines)


@pytest.mark.parametrize("name", family.ALGORITHMS)
def test_every_algorithm_of_the_family_takes_meta_steps(name):
    case = CASES["omnifc"].resized(tasks=2)
    maml = family.ALGORITHMS[name](case.model(), case)
    family.meta_step(maml, case)()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in maml.parameters())
    assert maml.recognised is None or maml.recognised.runner is not None


def test_another_tree_must_be_a_commit():
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    with pytest.raises(SystemExit, match="no-such-ref is no commit, tag or branch"):
        compare.main(parser.parse_args(["no-such-ref"]))


def launches_by_kernel(output: Path, *options: str) -> list[dict]:
    """What is counted for omni51."""
    pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")
    command = [sys.executable, "-m", "bench", "launches", "--cases", "omni51", "--output", output]
    root = Path(launches.__file__).parent.parent
    subprocess.run([*command, *options], check=True, cwd=root, stdout=subprocess.DEVNULL)
    records = map(json.loads, output.read_text().splitlines())
    return [
        record | {"launches": {name: count for name, (count, _) in record["launches"].items()}}
        for record in records
    ]


def test_launches_are_counted_without_a_gpu(tmp_path):
    """And a meta-step takes few: each waits for the one before."""
    (record,) = launches_by_kernel(tmp_path / "launches.jsonl")
    counts = record["launches"]
    # four layers: support and query forward; the tangent is one more
    assert counts["product_kernel"] == 4 * 3
    assert counts["normalise_kernel"] == 4 * 2
    assert not any("clone" in name or "copy" in name for name in counts)
    assert sum(counts.values()) <= 90


def test_launches_of_operations(tmp_path):
    """One move of theta there, one of a direction, one of a gradient back; no weight is copied, and
    nothing is worked out that nobody reads.
    """
    records = launches_by_kernel(tmp_path / "launches.jsonl", "--operations")
    counts = {record["operation"]: record["launches"] for record in records}
    moves = {"forward": 1, "backward": 2, "tangent": 2, "backward_tangent": 3}
    assert {name: found["torch index_select"] for name, found in counts.items()} == moves
    assert not any("clone" in kernel for found in counts.values() for kernel in found)
    # of the pass before, the gradients of values alone: the first layer has none
    assert counts["backward_tangent"]["gradients_kernel"] == 3 + 4
    assert counts["backward_tangent"]["matmul_kernel"] == 5
    cats = {name: found.get("torch cat", 0) for name, found in counts.items()}
    assert cats == {"forward": 1, "backward": 1, "tangent": 0, "backward_tangent": 1}
    assert sum(map(sum, (found.values() for found in counts.values()))) <= 115


def test_other_processes_want_the_cores_meanwhile():
    before = set(children())
    with busy_processes(2):
        others = set(children()) - before
        assert len(others) == 2
    assert not others & set(children())


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
