"""Every adapter method the lab knows, with its paper, and what it can do."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

NAME = "methods"
HELP = "list the adapter methods"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", nargs="?", metavar="METHOD", help="one method's settings and notes")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    from lab.methods import METHODS

    return [describe(m) for m in ([METHODS[args.method]] if args.method else METHODS)]


def describe(method: Any) -> dict[str, Any]:
    """A row as JSON."""
    return {
        "id": method.id,
        "name": method.name,
        "kind": method.kind,
        "paper": {"title": method.paper.title, "url": method.paper.url},
        "low_rank": method.low_rank,
        "own": method.own,
        "summary": method.summary,
        "equation": method.equation,
        "knobs": [
            {"name": f.name, "default": f.default, **{k: v for k, v in f.metadata.items() if v not in (None, False)}}
            for f in dataclasses.fields(method.knobs)
        ],
        "tensors": method.tensors,
        "identity_start": method.identity_start,
        "conv": method.conv,
        "mergeable": method.mergeable,
        "needs": method.needs,
        "learning_rate": method.learning_rate,
        "remark": method.remark,
    }


def show(result: list[dict[str, Any]]) -> None:
    if len(result) > 1:
        for row in result:
            print(
                f"{row['id']:<18}{row['name']:<24}{row['kind']:<18}{'own' if row['own'] else 'PEFT':<6}{row['summary']}"
            )
        return
    row = result[0]
    print(f"{row['name']}: {row['summary']}\n{row['paper']['title']}, {row['paper']['url']}\n{row['equation']}\n")
    for knob in row["knobs"]:
        print(f"  {knob['name']} = {knob['default']}: {knob['help']}")
    if row["remark"]:
        print(f"\n{row['remark']}")
