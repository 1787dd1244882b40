"""Proves that each extra installs alone from the wheel and starts: `python .ci/extras.py dist/factmesh-*.whl`.
Starting means: --help answers, or a service without settings names those that it misses; never a missing module.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UV = [sys.executable, "-m", "uv"]
#: Extra -> the command that must start with it alone, its arguments, its exit codes, and what it must say.
COMMANDS: dict[str, tuple[list[str], set[int], str]] = {
    "intake": (["factmesh-intake"], {1, 2, 78}, "FACTMESH_KAFKA_BOOTSTRAP"),
    "orchestrator": (["factmesh-orchestrator"], {1, 2, 78}, "FACTMESH_KAFKA_BOOTSTRAP"),
    "connector": (["factmesh-connector"], {1, 2, 78}, "FACTMESH_KAFKA_BOOTSTRAP"),
    "notifier": (["factmesh-notifier"], {1, 2, 78}, "FACTMESH_KAFKA_BOOTSTRAP"),
    "quarantine": (["factmesh-quarantine"], {1, 2, 78}, "FACTMESH_KAFKA_BOOTSTRAP"),
    "sandbox": (["factmesh-sandbox", "--help"], {0}, "sandbox"),
    "cli": (["factmesh", "dlq", "--help"], {0}, "replay"),
    "embedded": (["python", "-c", "import factmesh.embedded, factmesh.stack; print('embedded')"], {0}, "embedded"),
}
#: Without any extra every command is there, and says which extra it needs instead of showing a stack trace.
MISSING: dict[str, tuple[list[str], str]] = {
    "factmesh": (["factmesh", "dlq", "--help"], "factmesh[cli]"),
    "factmesh-intake": (["factmesh-intake"], "factmesh[intake]"),
    "factmesh-orchestrator": (["factmesh-orchestrator"], "factmesh[orchestrator]"),
    "factmesh-connector": (["factmesh-connector"], "factmesh[connector]"),
    "factmesh-notifier": (["factmesh-notifier"], "factmesh[notifier]"),
    "factmesh-quarantine": (["factmesh-quarantine"], "factmesh[quarantine]"),
    "factmesh-sandbox": (["factmesh-sandbox", "--schema"], "factmesh[sandbox]"),
}


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FACTMESH_", "PYTHONPATH"))}
    return kept | {"UV_FIND_LINKS": kept.get("PIP_FIND_LINKS", ""), "NO_COLOR": "1", "COLUMNS": "200"}


def install(folder: Path, wheel: Path, extra: str | None) -> Path:
    """A fresh environment with the locked packages of one extra and nothing else; returns its bin folder."""
    bin_folder = folder / ("Scripts" if sys.platform == "win32" else "bin")
    run = {"check": True, "env": environment(), "cwd": folder.parent}
    subprocess.run([*UV, "venv", "--quiet", "--python", sys.executable, str(folder)], **run)  # type: ignore[call-overload]
    pip = [*UV, "pip", "install", "--quiet", "--python", str(folder)]
    if extra is not None:
        lock = ROOT / "lock" / f"{extra}.txt"
        subprocess.run([*pip, "--require-hashes", "-r", str(lock)], **run)  # type: ignore[call-overload]
        # With its dependencies checked: a lock that misses one of them fails here instead of finding it elsewhere.
        subprocess.run([*pip, "--no-index", f"factmesh[{extra}] @ {wheel.as_uri()}"], **run)  # type: ignore[call-overload]
    else:
        subprocess.run([*pip, "-c", str(ROOT / "lock" / "dev.txt"), str(wheel)], **run)  # type: ignore[call-overload]
    return bin_folder


def started(bin_folder: Path, command: list[str]) -> tuple[int, str]:
    program = [str(bin_folder / command[0]), *command[1:]]
    result = subprocess.run(
        program, env=environment(), cwd=bin_folder.parent, capture_output=True, text=True, timeout=60
    )
    return result.returncode, result.stdout + result.stderr


def main(wheel: Path) -> int:
    failures = 0
    scratch = Path(tempfile.mkdtemp(prefix="fm-extras-"))
    try:
        for extra, (command, codes, words) in COMMANDS.items():
            try:
                bin_folder = install(scratch / extra, wheel, extra)
            except subprocess.CalledProcessError:
                failures += 1
                print(
                    f"FAIL factmesh[{extra}]: lock/{extra}.txt does not satisfy pyproject.toml; run `make lock`",
                    flush=True,
                )
                continue
            code, output = started(bin_folder, command)
            good = code in codes and words in output and "Traceback" not in output
            print(f"{'ok  ' if good else 'FAIL'} factmesh[{extra}] alone: {' '.join(command)}", flush=True)
            if not good:
                failures += 1
                print(f"exit {code}, expected {sorted(codes)} and {words!r}:\n{output}")
            shutil.rmtree(scratch / extra, ignore_errors=True)
        bare = install(scratch / "bare", wheel, None)
        for name, (command, words) in MISSING.items():
            code, output = started(bare, command)
            # A service whose extra adds nothing to the base may start: then it asks for its settings.
            starts = "FACTMESH_KAFKA_BOOTSTRAP" in output
            good = code != 0 and (words in output or starts) and "Traceback" not in output
            print(f"{'ok  ' if good else 'FAIL'} {name} without its extra names it", flush=True)
            if not good:
                failures += 1
                print(f"exit {code}, expected {words!r}:\n{output}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
