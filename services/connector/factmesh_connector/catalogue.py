"""Finds the connectors that this process serves: YAML files of the project folder and plug-ins by entry point.
Whatever is wrong with one of them is said at once, all together, and the service does not start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from factmesh import yaml
from factmesh.clock import Clock
from factmesh.errors import DefinitionError, FactmeshError, SettingsError
from factmesh.evaluation import Expressions
from factmesh.http_client import HttpClient
from factmesh_connector import declared, yaml_connector
from factmesh_connector.model import Operation, Strategy
from factmesh_connector.protocol import Connector

GROUP = "factmesh.connectors"
#: The notifier has this member of the command topics for itself.
RESERVED = frozenset({"notifier"})


def load(
    folder: Path | None,
    wanted: Iterable[str],
    *,
    http: HttpClient,
    clock: Clock,
    expressions: Expressions,
    environ: Mapping[str, str] | None = None,
    plugins: Iterable[EntryPoint] | None = None,
) -> dict[str, Connector]:
    """The connectors by name: `wanted`, or every file of `folder` and no plug-in where nothing is named.

    A plug-in serves only where it is named: an installed package never begins to call out by itself.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder is not None else {}
    offered = {p.name: p for p in (entry_points(group=GROUP) if plugins is None else plugins)}
    names = list(dict.fromkeys(wanted)) or list(files)
    found: dict[str, Connector] = {}
    problems: list[str] = []
    for name in names:
        try:
            if name in RESERVED:
                raise SettingsError(f"a connector cannot be called {name!r}", hint="choose another name")
            if name in files:
                document = yaml.load(files[name])
                shape = declared.parse(document, stem=name)
                found[name] = yaml_connector.build(
                    shape, document, http=http, clock=clock, expressions=expressions, environ=environ
                )
            elif name in offered:
                found[name] = _plugin(offered[name])
            else:
                known = ", ".join(sorted({*files, *offered})) or "none"
                raise SettingsError(f"there is no connector {name!r}", hint=f"there are: {known}")
        except FactmeshError as error:
            problems.append(f"connector {name}: {error}")
    if problems:
        raise SettingsError("cannot start: " + "; ".join(problems), hint="correct this, then start again")
    if not found:
        raise SettingsError(
            "no connector is declared", where=str(folder or ""), hint="set FACTMESH_PROJECT or FACTMESH_CONNECTORS"
        )
    return found


def _plugin(entry: EntryPoint) -> Connector:
    """A plug-in, made and checked for what the service will ask of it."""
    try:
        made: Connector = entry.load()()
    except FactmeshError:
        raise
    except Exception as error:
        raise DefinitionError(
            f"the plug-in {entry.value} cannot be made: {type(error).__name__}", hint="see the plug-in's own notes"
        ) from error
    operations = getattr(made, "operations", None)
    if getattr(made, "name", None) != entry.name or not isinstance(operations, Mapping) or not operations:
        raise DefinitionError(
            f"the plug-in {entry.value} has no `name` {entry.name!r} and `operations`", hint="see protocol.Connector"
        )
    for name, operation in operations.items():
        if not isinstance(operation, Operation) or operation.name != name:
            raise DefinitionError(f"operation {name!r} of {entry.value} is not an Operation of that name")
        if operation.strategy is Strategy.LOOKUP and not callable(getattr(made, "look_up", None)):
            raise DefinitionError(f"operation {name!r} of {entry.value} needs `look_up`")
    return made
