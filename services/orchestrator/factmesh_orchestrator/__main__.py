"""The command `factmesh-orchestrator`: settings from the environment, then `run`.
Nothing else lives here.
"""

from __future__ import annotations

from factmesh.command import run_service


def main() -> None:
    run_service("orchestrator")


if __name__ == "__main__":
    main()
