"""Fails when something generated drifted from its source: the schema lock, the workflow JSON Schema, tables, diagrams.
Every generator is a command that can also check; this file is the list of them and nothing else.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FACTMESH = [sys.executable, "-m", "factmesh_cli"]

#: What is checked, and the command that exits non-zero and says what to run when it drifted.
CHECKS: list[tuple[str, list[str]]] = [
    ("schemas: lint, compatibility, id lock", [*FACTMESH, "schema", "check"]),
    ("workflows: JSON Schema of the definitions", [*FACTMESH, "workflow", "schema", "--check"]),
    ("orchestrator: its README draws the transition table", [*FACTMESH, "workflow", "states", "--check"]),
    ("docs: topics, metrics, alerts, settings, graphs, AsyncAPI", [*FACTMESH, "docs", "--check"]),
]


def locks_agree() -> list[str]:
    """The one-service locks pin what the development lock pins, name no host, and hash everything."""
    problems = []
    pins: dict[str, str] = {}
    for path in sorted((ROOT / "lock").glob("*.txt"), key=lambda path: (path.stem != "dev", path.stem)):
        text = path.read_text(encoding="utf-8")
        for word in ("--index-url", "--extra-index-url", "--find-links", "://"):
            if word in text:
                problems.append(f"{path.name} holds {word!r}: a lock names packages and hashes only; run `make lock`")
        for block in text.replace("\\\n", " ").splitlines():
            if "==" not in block or block.lstrip().startswith("#"):
                continue
            name, _, rest = block.partition("==")
            version = rest.split()[0]
            if "--hash=sha256:" not in block:
                problems.append(f"{path.name}: {name} has no hash; run `make lock`")
            if pins.setdefault(name, version) != version:
                problems.append(
                    f"{path.name}: {name}=={version}, the development lock has {pins[name]}; run `make lock`"
                )
    return problems


def main() -> int:
    failed = 0
    for title, command in CHECKS:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(f"{'ok  ' if result.returncode == 0 else 'FAIL'} {title}", flush=True)
        if result.returncode != 0:
            failed += 1
            print(result.stdout + result.stderr, flush=True)
    problems = locks_agree()
    print(
        f"{'FAIL' if problems else 'ok  '} locks: hashed, hostless, one version of everything", *problems, sep="\n     "
    )
    return 1 if failed or problems else 0


if __name__ == "__main__":
    sys.exit(main())
