"""Write the README's results table and the plots from the JSONL of the last runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

from bench.cases import CASES
from bench.contenders import CONTENDERS
from bench.machine import ROOT
from bench.run import RESULTS

START, END = "<!-- results -->", "<!-- /results -->"
LOOP = ("learn2learn", "eager")  # what the speed-ups are over: the first that was there

Record = dict[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, help="JSONL of `bench run` (default: the newest)")
    parser.add_argument("--scale", type=Path, help="JSONL of `bench scale` (default: the newest)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")


def main(arguments: argparse.Namespace) -> int:
    matplotlib.use("Agg")
    run, scale = arguments.run or newest("run"), arguments.scale or newest("scale")
    if run is None:
        raise SystemExit(f"no run-*.jsonl in {RESULTS}: `python -m bench run` makes one")
    records = read(run)
    insert(arguments.readme, table(records, run))
    plot_cases(records, RESULTS / "cases.png")
    if scale is not None:
        plot_scaling(read(scale), RESULTS / "scaling.png")
    print(f"{arguments.readme} and {RESULTS}/*.png written from {run}")
    return 0


def newest(kind: str) -> Path | None:
    return max(RESULTS.glob(f"{kind}-*.jsonl"), default=None)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def insert(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{readme} has no '{START}' ... '{END}' to write the results between")
    readme.write_text(f"{before}{START}\n{text}\n{END}{after}")


def table(records: list[Record], source: Path) -> str:
    by = {(r["contender"], r["case"]): r for r in records}
    cases = [name for name in CASES if any(case == name for _, case in by)]
    rows = [["ms per meta-step", *cases], ["---", *["---:"] * len(cases)]]
    for contender in CONTENDERS.values():
        cells = [cell(by.get((contender.name, case))) for case in cases]
        if any(by.get((contender.name, c), {}).get("status") in ("ok", "wrong") for c in cases):
            rows.append([contender.label, *cells])
    loop = next((n for n in LOOP if any((n, case) in by for case in cases)), LOOP[-1])
    over = CONTENDERS[loop].label.removesuffix(" in plain PyTorch")
    rows.append([f"**door 3 over {over}**", *(speedup(by, case) for case in cases)])
    rows.append(["**of the FMA peak**", *(share_of_peak(by.get(("door3", c))) for c in cases)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", caption(records, source)])


def cell(record: Record | None) -> str:
    if record is None or record["status"] == "unavailable":
        return ""
    if record["status"] != "ok":
        return str(record["status"])
    return milliseconds(1e3 * record["p50_s"])


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def speedup(by: dict[tuple[str, str], Record], case: str) -> str:
    ours = by.get(("door3", case))
    loop = next((r for name in LOOP if (r := by.get((name, case))) and r["status"] == "ok"), None)
    if loop is None or ours is None or ours["status"] != "ok":
        return ""
    return f"**{loop['p50_s'] / ours['p50_s']:.3g}×**"


def share_of_peak(record: Record | None) -> str:
    if record is None or record["status"] != "ok":
        return ""
    return f"{100 * record['peak_fraction']:.0f} %"


def caption(records: list[Record], source: Path) -> str:
    machine = records[0]["environment"]
    commits = ", ".join(dict.fromkeys(r["environment"]["commit"] for r in records))
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    return (
        f"Medians, exact second order, float32, {machine['threads']} threads of {machine['cpu']} "
        f"({machine['isa']}, measured FMA peak {machine['peak_gflops']:.0f} GFLOP/s); "
        f"torch {machine['torch']}{', ' + peers if peers else ''}; commit {commits}. "
        "*wrong*: the gradient does not agree with the float64 oracle, so its time is not shown. "
        f"Percentiles, memory and compile times: `{source.resolve().relative_to(ROOT)}`."
    )


def plot_cases(records: list[Record], path: Path) -> None:
    import matplotlib.pyplot as plt

    timed = [r for r in records if r["status"] == "ok"]
    cases = [name for name in CASES if any(r["case"] == name for r in timed)]
    figure, axes = plt.subplots(1, len(cases), figsize=(2.6 * len(cases), 4.2), squeeze=False)
    for ax, case in zip(axes[0], cases, strict=True):
        bars = sorted((r for r in timed if r["case"] == case), key=lambda r: r["p50_s"])
        colours = ["C1" if CONTENDERS[r["contender"]].ours else "C0" for r in bars]
        ax.barh([r["contender"] for r in bars], [1e3 * r["p50_s"] for r in bars], color=colours)
        ax.set(title=case, xscale="log", xlabel="ms per meta-step")
        ax.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_scaling(records: list[Record], path: Path) -> None:
    import matplotlib.pyplot as plt

    axes_names = list(dict.fromkeys(r["axis"] for r in records))
    figure, axes = plt.subplots(
        2, len(axes_names), figsize=(4 * len(axes_names), 6.4), squeeze=False, sharex="col"
    )
    for column, axis in enumerate(axes_names):
        for contender in dict.fromkeys(r["contender"] for r in records):
            points = [
                r
                for r in records
                if (r["axis"], r["contender"], r["status"]) == (axis, contender, "ok")
            ]
            values = [r["value"] for r in points]
            label = CONTENDERS[contender].label
            axes[0][column].plot(values, [1e3 * r["p50_s"] for r in points], "o-", label=label)
            axes[1][column].plot(values, [r["peak_memory_mb"] for r in points], "o-", label=label)
        case = next(r["case"] for r in records if r["axis"] == axis)
        axes[0][column].set(title=f"{axis} ({case})", xscale="log", yscale="log")
        axes[1][column].set(xlabel=axis, xscale="log", yscale="log")
    axes[0][0].set_ylabel("ms per meta-step")
    axes[1][0].set_ylabel("peak memory, MB")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
