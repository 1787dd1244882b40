"""The command `factmesh-orchestrator`: settings -> run(SERVICE). Nothing else lives here."""

from __future__ import annotations

from factmesh.service import run
from factmesh_orchestrator.service import SERVICE


def main() -> None:
    """Run the orchestrator until SIGTERM."""
    run(SERVICE)


if __name__ == "__main__":
    main()
