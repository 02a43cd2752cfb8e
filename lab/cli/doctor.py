"""What works on this machine, and what to change: GPU, driver, memory, disk, versions, bases, optional packages."""

from __future__ import annotations

import argparse
from typing import Any

NAME = "doctor"
HELP = "what works on this machine, and what to change"
MARKS = {"ok": "✓", "note": "·", "problem": "✗"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # it has no settings


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lab import doctor

    return doctor.examine()


def show(result: dict[str, Any]) -> None:
    """Print the findings, then the facts."""
    for finding in result["findings"]:
        print(f"{MARKS[finding['state']]} {finding['text']}")
        if finding["do"]:
            print(f"    → {finding['do']}")
    cpu, memory = result["processor"], result["memory"]
    print(f"\nProcessor  {cpu['name']}, {cpu['cores']} cores")
    print(f"Memory     {_gib(memory['available_bytes'])} of {_gib(memory['total_bytes'])} free")
    for gpu in result["gpus"] or [{}]:
        told = f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, driver {gpu['driver'] or '–'}" if gpu else "none"
        print(f"GPU        {told}")
    for name, place in result["disk"].items():
        print(f"Disk       {_gib(place['free_bytes'])} free for {name}: {place['path']}")
    print("Versions   " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    for name, extra in result["extras"].items():
        print(f"Optional   {name} {extra['version'] or 'not installed'}: {extra['for']}")
    print("\nBases")
    for base in result["bases"]:
        size = f"{base['bytes'] / 1e9:.1f} GB" if (base["bytes"] or 0) > 1e8 else ""
        print(f"  {base['id']:<20} {'here' if base['here'] else 'to download':<12} {size:>8}  {base['name']}")
    if result.get("cached"):
        print("\nIn the Hub's cache")
    for found in result.get("cached", []):
        print(
            f"  {found['bytes'] / 1e9:>6.1f} GB  {found['repo']}{'  (a base)' if found['pipeline'] and found['usable'] else ''}"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
