"""`make demo`: a whole comparison without a browser, into a folder.

    python -m lab.demo out/demo [example subject]

Five pictures of an example subject, LoRA and NoRA, two seeds each, the preset settings: the same as pressing Train.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from lab.bases import ASSETS
from lab.cli import main as lab


def main(argv: Sequence[str]) -> int:
    out = argv[0] if argv else "out/demo"
    subject = argv[1] if len(argv) > 1 else "fox"
    began = time.monotonic()
    code = lab(["subject", str(ASSETS / "subjects" / subject), "--out", out])
    print(f"{time.monotonic() - began:.0f} seconds; open {out}/report.html", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
