"""Starts the intake service: settings from the environment, then the loops until SIGTERM.
Nothing but the start lives here.
"""

from __future__ import annotations

from factmesh.service import run
from factmesh_intake.service import SERVICE


def main() -> None:
    run(SERVICE)


if __name__ == "__main__":
    main()
