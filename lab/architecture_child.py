"""`python -m lab.architecture_child < config.json`: one line of JSON, the layer table or {"error": sentence}.

A process of its own, so that the page answers before torch is imported and no configuration can take it down.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MEMORY_BYTES = 12 << 30
_QKV = (
    "Query, key and value are one fused layer. Asked for all three, it is counted whole, as PEFT adapts it; asked for "
    "some of them, each is counted as a square layer of its own."
)
FUSED = {
    ("qkv_proj", "query_key_value", "Wqkv", "attn.qkv", "c_attn"): _QKV,
    "gate_up_proj": "The MLP's gate and up are one fused layer, counted whole as up, as PEFT adapts it.",
}


def main() -> None:
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.addaudithook(_alone)
    config = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    limit_memory()
    from lab.errors import LabError

    try:
        answer = _table(config)
    except LabError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "The model could not be laid out: it is too large for this machine's memory."}
    os.write(out, (json.dumps(answer) + "\n").encode())


def _alone(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse connections: some configurations ask their library to fetch a backbone or a kernel."""
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg"):
        raise PermissionError("it asks for a download, and a configuration alone is read here")


def _table(config: dict[str, Any]) -> dict[str, Any]:
    from lab import layer_tables
    from lab.errors import LabError

    model = layer_tables.build(config)
    rows = layer_tables.rows(model)
    kind = type(model)
    if not rows:
        raise LabError(f"{kind.__name__} has no layer whose role the lab can tell: paste a table of shapes.")
    head = {"parameters": layer_tables.parameters(model), "library": kind.__module__.split(".")[0]}
    note = " ".join(text for end, text in FUSED.items() if any(row["name"].endswith(end) for row in rows))
    rest = {"source": kind.__name__, "note": note, "unit": {}, "memory": {}}
    return {**head, **rest, "fields": layer_tables.FIELDS, "layers": layer_tables.pack(rows)}


def limit_memory(most: int = MEMORY_BYTES) -> None:
    """This process may take this many bytes, where the system knows such a limit."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    except (ImportError, ValueError, OSError):
        return  # no such limit on this system: the time limit of the parent holds alone


if __name__ == "__main__":
    main()
