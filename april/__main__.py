"""`april` and `python -m april`."""

from __future__ import annotations

from april.cli.main import main

if __name__ == "__main__":
    main()
