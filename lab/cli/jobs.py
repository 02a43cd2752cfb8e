"""The queue from the command line: what waits, what runs, what failed and why.

Whoever keeps the machine sees everybody's runs here. A run or comparison is named by its id or by the first
characters of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from lab.errors import LabError

if TYPE_CHECKING:
    from lab.runs import Run, Store

NAME = "jobs"
HELP = "list, show, cancel, retry and delete runs; be a worker"
DEVICE_HELP = "which GPU, as CUDA_VISIBLE_DEVICES names it (default: the first)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help, description=help)
        sub.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON on standard output"
        )
        return sub

    listing = add("list", "all runs, the newest comparison first (the default)")
    listing.add_argument("--state", help="only runs in this state: queued, running, done, failed, cancelled")
    listing.add_argument("--method", help="only runs of this method")
    listing.add_argument("--text", help="only runs with this text in title, task, method or message")
    showing = add("show", "one run with its result and its log's last lines")
    showing.add_argument("id", help="the run's id, or the beginning of it")
    showing.add_argument("--lines", type=int, default=20, help="lines of the log (default 20)")
    add("cancel", "stop a run").add_argument("id", help="the run's id, or the beginning of it")
    add("retry", "queue a failed or cancelled run again").add_argument(
        "id", help="the run's id, or the beginning of it"
    )
    add("delete", "remove a comparison and all its files").add_argument(
        "id", help="the comparison's id (or one of its runs'), or the beginning of it"
    )
    working = add("worker", "do the queued runs, in the foreground, until stopped")
    working.add_argument("--device", help=DEVICE_HELP)
    working.add_argument("--drain", action="store_true", help="leave when the queue is empty")


def run(args: argparse.Namespace) -> Any:
    action = args.action or "list"
    if action == "worker":
        return {"action": action} | _work(args.device, args.drain)
    from lab.jobs import ensure_worker
    from lab.runs import ANYONE, Store

    store = Store()
    if action == "list":
        filters = {name: getattr(args, name, None) for name in ("state", "method", "text")}
        return [_row(run) for run in store.runs(ANYONE, **filters)]
    if action == "delete":
        comparison = _comparison(store, args.id)
        store.delete(ANYONE, comparison)
        return {"action": action, "comparison": comparison}
    found = _run(store, args.id)
    if action == "cancel":
        store.cancel(ANYONE, found.id)
        found = _settled(store, found.id)
    elif action == "retry":
        found = store.retry(ANYONE, found.id)
        ensure_worker(store.home)
    shown = {"action": action} | _row(found)
    if action == "show":
        shown |= {"result": found.result(), "log": store.log_tail(ANYONE, found.id, args.lines)}
    return shown


def show(result: Any) -> None:
    if isinstance(result, list):
        _print_table(result)
    elif "worker" in result:
        print(f"Worker {result['worker']} has ended.")
    elif result["action"] == "delete":
        print(f"Comparison {result['comparison']} is deleted.")
    else:
        for name, value in result.items():
            if name not in ("action", "log") and value not in (None, "", {}):
                print(f"{name:<12} {value}")
        if result.get("log"):
            print(f"\n{result['log']}")


def _work(device: str | None, drain: bool) -> dict[str, Any]:
    from lab.jobs.worker import work
    from lab.runs import default_home

    return work(default_home(), device, drain)


def _row(run: Run) -> dict[str, Any]:
    names = ("id", "comparison", "task", "method", "seed", "knobs", "state", "phase", "step", "steps", "rate", "eta_s")
    names += ("message", "created", "started", "finished", "attempt", "position")
    return {name: getattr(run, name) for name in names} | {"seconds": run.seconds, "folder": str(run.folder)}


def _run(store: Store, beginning: str) -> Run:
    from lab.runs import ANYONE

    return _only([r for r in store.runs(ANYONE) if r.id.startswith(beginning)], beginning, "run")


def _comparison(store: Store, beginning: str) -> str:
    from lab.runs import ANYONE

    runs = store.runs(ANYONE)
    ids = {r.comparison for r in runs if r.comparison.startswith(beginning) or r.id.startswith(beginning)}
    return _only(sorted(ids), beginning, "comparison")


def _only(found: list[Any], beginning: str, noun: str) -> Any:
    if len(found) != 1 or not beginning:
        number = f"{len(found)} {noun}s begin" if found else f"No {noun} begins"
        raise LabError(f"{number} with '{beginning}': see `python -m lab jobs` for their ids.")
    return found[0]


def _settled(store: Store, run_id: str) -> Run:
    """The run once it has stopped, or as it is after three seconds (nobody works on it: the next worker will)."""
    from lab.runs import ANYONE

    deadline = time.monotonic() + 3.0
    while (run := store.run(ANYONE, run_id)).cancelling and time.monotonic() < deadline:
        time.sleep(0.1)
    return run


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("No runs.")
        return
    width = max(len(row["method"]) for row in rows)
    for row in rows:
        steps = f"{row['step']}/{row['steps']}" if row["steps"] else ""
        what = row["message"] or (f"number {row['position']} in the queue" if row["position"] else row["phase"])
        print(f"{row['id'][:8]}  {row['method']:<{width}}  s{row['seed']:<3} {row['state']:<9} {steps:>11}  {what}")
    waiting = sum(row["state"] == "queued" for row in rows)
    print(f"{len(rows)} runs, {waiting} waiting.", file=sys.stderr)
