"""The command `factmesh-quarantine`: settings from the environment, then `run`.
Nothing else lives here.
"""

from __future__ import annotations

from factmesh.service import run
from factmesh_quarantine.service import SERVICE


def main() -> None:
    run(SERVICE)


if __name__ == "__main__":
    main()
