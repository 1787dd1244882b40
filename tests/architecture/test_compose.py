"""`docker compose up` as far as a file can be checked without Docker: the services, commands and settings are ours."""

from __future__ import annotations

import importlib
import re
import tomllib
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from factmesh_cli.__main__ import SUBCOMMANDS

from .sources import ROOT

COMPOSE: dict[str, Any] = YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES = sorted(path.name for path in (ROOT / "services").iterdir() if path.is_dir())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")


def test_every_service_has_a_container_and_every_container_is_known() -> None:
    """Issue 6: a container for each service, with Kafka, PostgreSQL and a Confluent-compatible registry."""
    others = {"kafka", "postgres", "registry", "roles", "schemas", "workflows", "sandbox"}
    assert set(COMPOSE["services"]) == {*SERVICES, *others}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_runs_its_own_command_with_its_own_role(service: str) -> None:
    """Issue 6.4, G4: one image file with a service argument; the container's address is that service's role, and every
    variable that it is given is a setting that exists."""
    container = COMPOSE["services"][service]
    assert container["build"] == {"context": ".", "dockerfile": "deploy/Dockerfile", "args": {"SERVICE": service}}
    assert f"factmesh-{service}" in PROJECT["scripts"]
    environment = container["environment"]
    assert environment["FACTMESH_POSTGRES_DSN"].startswith(f"postgresql://{service}:")
    settings = importlib.import_module(f"factmesh_{service}.service").SERVICE.settings
    assert set(environment) - {f"FACTMESH_{name.upper()}" for name in settings.model_fields} == set()
    waits = {name: wait["condition"] for name, wait in container["depends_on"].items()}
    assert waits == {
        "kafka": "service_healthy",
        "roles": "service_completed_successfully",
        "schemas": "service_completed_successfully",
    }


def test_what_containers_wait_for_can_come_true() -> None:
    """A container that waits for `service_healthy` of one without a health check would wait for ever."""
    for name, container in COMPOSE["services"].items():
        for wanted, wait in container.get("depends_on", {}).items():
            assert wanted in COMPOSE["services"], f"{name} waits for {wanted}"
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in COMPOSE["services"][wanted], f"{name} waits for {wanted}"


def test_ports_are_bound_to_this_machine() -> None:
    """G4: nothing that compose starts listens on the network."""
    for name, container in COMPOSE["services"].items():
        for port in container.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"


def test_volumes_and_files_exist() -> None:
    """Issue 6: `docker compose up` from a fresh clone finds every file that it names."""
    for container in COMPOSE["services"].values():
        for volume in container.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).is_dir(), source
        for file in container.get("env_file", []):
            assert (ROOT / file).is_file(), file
        if "build" in container:
            assert (ROOT / "lock" / f"{container['build']['args']['SERVICE']}.txt").is_file()


def test_the_command_line_calls_exist() -> None:
    """Issue 6: what the one-shot containers run are sub-commands of `factmesh`."""
    for name in ("roles", "schemas", "workflows"):
        program, subcommand, act = COMPOSE["services"][name]["command"][:3]
        assert program == "factmesh"
        app = importlib.import_module(SUBCOMMANDS[subcommand].module).app
        assert act in typer.main.get_command(app).commands, (subcommand, act)  # type: ignore[attr-defined]


def test_the_image_copies_what_exists_and_installs_by_hash() -> None:
    """Issue 6.1: the image holds the locked packages of one service, checked by hash, and does not run as root."""
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for path in source.split():
            if "${" not in path:
                assert (ROOT / path).exists(), path
    assert "--require-hashes -r /tmp/lock.txt" in DOCKERFILE
    assert re.search(r"^USER 10001$", DOCKERFILE, re.MULTILINE)
    pinned = re.search(r"hatchling==(\S+?)\"", DOCKERFILE)
    assert pinned is not None
    assert f"hatchling=={pinned.group(1)} " in (ROOT / "lock" / "dev.txt").read_text(encoding="utf-8")
