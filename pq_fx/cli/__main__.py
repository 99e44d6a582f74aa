"""``python -m pq_fx.cli``: the same as ``pq-fx``."""

from __future__ import annotations

import sys

from pq_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
