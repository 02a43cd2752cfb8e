"""Serve NoRA Lab: `python app.py [--host HOST] [--port PORT]`, by default on http://localhost:7860."""

from __future__ import annotations

import argparse
import os
import sys

from lab.errors import LabError
from lab.ui.page import serve


def main() -> int:
    port = os.environ.get("PORT") or os.environ.get("GRADIO_SERVER_PORT") or "7860"
    # A container (Spaces, Docker) must listen to the outside; on a laptop the page is its user's alone.
    inside = os.environ.get("SPACE_ID") or os.path.exists("/.dockerenv")  # noqa: PTH110
    host = os.environ.get("GRADIO_SERVER_NAME") or ("0.0.0.0" if inside else "127.0.0.1")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default=host)
    parser.add_argument("--port", type=int, default=port)
    given = parser.parse_args()
    try:
        serve(given.host, given.port)
    except LabError as problem:
        print(f"app.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
