"""`python -m trainyard_operator`."""

from __future__ import annotations

from trainyard_operator.cli import main

if __name__ == "__main__":
    main()
