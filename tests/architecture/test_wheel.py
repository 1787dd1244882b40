"""What is shipped: the wheel holds every file that the packages need, and nothing of the repository besides."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .sources import PACKAGES, ROOT, shipped_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def names() -> Iterator[set[str]]:
    with tempfile.TemporaryDirectory(prefix="fm-wheel-") as folder:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = Path(folder).glob("*.whl")
        yield set(zipfile.ZipFile(wheel).namelist())


def place(path: Path) -> str:
    """Where a source file lies in the wheel."""
    if path.is_relative_to(ROOT / "schemas"):
        return f"factmesh/schemas/{path.relative_to(ROOT / 'schemas').as_posix()}"
    package = next(package for package in PACKAGES if path.is_relative_to(package))
    return path.relative_to(package.parent).as_posix()


def test_the_wheel_holds_every_file_of_the_packages(names: set[str]) -> None:
    """G1, Packaging: SQL, migrations, schemas, locks and static assets are package data; none is left behind."""
    wanted = {place(path) for path in shipped_files()}
    assert {Path(name).suffix for name in wanted} >= {".py", ".sql", ".avsc", ".lock", ".properties", ".json"}
    assert wanted - names == set()


def test_the_wheel_holds_nothing_else(names: set[str]) -> None:
    """Packaging: no tests, no examples, no business process travels with the platform."""
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {package.name for package in PACKAGES}


def test_every_service_has_its_extra_its_command_and_its_lock() -> None:
    """Issue 6.1: a team installs and runs one service alone, from a lock of its own."""
    project = PROJECT["project"]
    services = sorted(path.name for path in (ROOT / "services").iterdir() if path.is_dir())
    for service in services:
        assert service in project["optional-dependencies"]
        assert project["scripts"][f"factmesh-{service}"] == f"factmesh_{service}.__main__:main"
    locks = {path.stem for path in (ROOT / "lock").glob("*.txt")}
    assert locks == {*project["optional-dependencies"]} - {"all"}
    everything = project["optional-dependencies"]["all"]
    assert everything == [
        f"factmesh[{','.join(n for n in project['optional-dependencies'] if n not in ('all', 'dev'))}]"
    ]


def test_the_locks_cover_what_pyproject_asks_for() -> None:
    """Issue 6.1: an extra that got a dependency gets a new lock; `make lock` was not forgotten."""
    project = PROJECT["project"]

    def wanted(extra: str) -> set[str]:
        entries = [*project["dependencies"], *project["optional-dependencies"][extra]]
        plain = {entry.partition(";")[0].partition("[")[0].partition(">=")[0].strip() for entry in entries}
        return {name.lower().replace("_", "-").replace(".", "-") for name in plain - {"factmesh"}}

    for path in (ROOT / "lock").glob("*.txt"):
        pinned = {line.partition("==")[0] for line in path.read_text(encoding="utf-8").splitlines() if "==" in line}
        assert wanted(path.stem) - pinned == set(), f"{path.name}: run `make lock`"
