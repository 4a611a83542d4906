"""`python -m bench run|scale|shapes|family|episodes|launches|compare|report`."""

from __future__ import annotations

import argparse

from bench import compare, episodes, family, launches, report, run, scale, shapes

VERBS = {
    "run": run,
    "scale": scale,
    "shapes": shapes,
    "family": family,
    "episodes": episodes,
    "launches": launches,
    "compare": compare,
    "report": report,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, module in VERBS.items():
        module.add_arguments(verbs.add_parser(name, help=module.__doc__))
    arguments = parser.parse_args()
    return VERBS[arguments.verb].main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
