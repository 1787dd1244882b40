"""Connector files and plug-ins: what is wrong with one is said with its line, and nothing half-right starts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from factmesh import yaml
from factmesh.clock import SystemClock
from factmesh.errors import DefinitionError, ErrorClass, SettingsError
from factmesh.expressions import default_expressions
from factmesh.http_client import HttpClient
from factmesh_connector import catalogue, declared
from factmesh_connector.model import Operation, Strategy
from factmesh_connector.protocol import CallContext, Connector

GOOD = """connector: shop
base_url: http://127.0.0.1:1
auth: {bearer: ref+env://TOKEN}
translations: {words: {A: a}}
operations:
  order:
    request: {method: POST, path: '/orders/${ input.id }', body: {id: '${ input.id }'}}
    response: {output: {state: '${ response.body.state }'}, translate: {state: words}}
    idempotency: {strategy: key, key_valid_s: 60}
    sensitive: true
"""
EXAMPLE = Path(__file__).parents[2] / "examples" / "customer_onboarding" / "connectors"


class Plugin:
    """What a team writes that needs more than YAML."""

    name = "odd"
    operations: Mapping[str, Operation] = {"do": Operation("do", Strategy.KEY)}

    async def call(self, operation: str, input: Mapping[str, Any], ctx: CallContext) -> Mapping[str, Any]:
        return {"did": operation, **input}

    async def look_up(self, operation: str, input: Mapping[str, Any], ctx: CallContext) -> Mapping[str, Any] | None:
        return None

    async def close(self) -> None:
        """Nothing is held."""


class Broken:
    def __init__(self) -> None:
        raise RuntimeError("token s3cret")


class Nameless(Plugin):
    name = "other"


class Mistyped(Plugin):
    operations = {"else": Operation("do", Strategy.KEY)}  # noqa: RUF012


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def load(http: HttpClient, folder: Path | None, *wanted: str, **more: Any) -> dict[str, Connector]:
    environ = more.pop("environ", {"TOKEN": "t"})
    return catalogue.load(
        folder, wanted, http=http, clock=SystemClock(), expressions=default_expressions(), environ=environ, **more
    )


def entry(name: str, kind: str) -> EntryPoint:
    return EntryPoint(name=name, value=f"{__name__}:{kind}", group=catalogue.GROUP)


class _Entry:
    """An entry point whose object is at hand: this module has no importable name under pytest's import mode."""

    group = catalogue.GROUP

    def __init__(self, name: str, made: Any) -> None:
        self.name, self.value, self._made = name, f"tests:{made.__name__}", made

    def load(self) -> Any:
        return self._made


def test_a_good_file_says_what_decides_about_its_operations() -> None:
    """C1: strategy, bounds and output fields of an operation come from its file."""
    operation = declared.parse(yaml.parse(GOOD, file="shop.yaml"), stem="shop").operation("order")
    assert (operation.strategy, operation.key_valid_s, operation.timeout_s) == (Strategy.KEY, 60, 10)
    assert (operation.sensitive, operation.output_fields) == (True, ("state",))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("strategy: key, key_valid_s: 60", "strategy: key", "shop.yaml:9"),
        ("strategy: key, key_valid_s: 60", "strategy: hope", "shop.yaml:9"),
        ("sensitive: true", "sensitve: true", "shop.yaml:10"),
        ("sensitive: true", "timeout_s: -1", "shop.yaml:10"),
        ("translate: {state: words}", "translate: {state: wurds}", "which is no table here"),
        ("translate: {state: words}", "translate: {other: words}", "which `output` does not have"),
        ("{bearer: ref+env://TOKEN}", "{header: X-Key}", "shop.yaml:3"),
        ("{strategy: key, key_valid_s: 60}", "{strategy: lookup, found: 'true'}", "`operation` or `request`"),
        ("{strategy: key, key_valid_s: 60}", "{strategy: lookup, found: 'true', operation: nix}", "no operation here"),
        ("connector: shop", "connector: store", "the file 'shop'"),
        ("    sensitive: true", "    errors: {statuses: {700: transient}}", "shop.yaml:10"),
        ("    sensitive: true", "    errors: {statuses: {500: bug}}", "shop.yaml:10"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(old: str, new: str, text: str) -> None:
    """C1, issue 6, bad input: unknown words, missing bounds and names that lead nowhere."""
    assert old in GOOD
    with pytest.raises(DefinitionError) as caught:
        declared.parse(yaml.parse(GOOD.replace(old, new), file="shop.yaml"), stem="shop")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("id: '${ input.id }'}}", "id: '${ input. }'}}", "shop.yaml:7"),
        ("id: '${ input.id }'}}", "id: '${ response.body.id }'}}", "knows no response"),
        ("'/orders/${ input.id }'", "'/orders?id=${ input.id }'", "parameters go into `query`"),
        ("'/orders/${ input.id }'", "'/orders/${ input.id'", "outside of"),
        ("http://127.0.0.1:1", "ftp://there", "shop.yaml:2"),
        ("http://127.0.0.1:1", "ref+env://NO_SUCH_URL", "NO_SUCH_URL is not set"),
        ("ref+env://TOKEN", "ref+env://NO_SUCH_TOKEN", "NO_SUCH_TOKEN is not set"),
        ("ref+env://TOKEN", "t0ken-itself", "not a secret reference"),
    ],
)
def test_what_does_not_compile_or_resolve_does_not_start(
    http: HttpClient, folder: Path, old: str, new: str, text: str
) -> None:
    """Issue 6, bad input: expressions, addresses and secrets are checked at start, and no secret is repeated."""
    assert old in GOOD
    (folder / "shop.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(SettingsError) as caught:
        load(http, folder)
    assert text in str(caught.value)
    assert "t0ken-itself" not in str(caught.value)


def test_every_file_is_served_unless_names_are_given(http: HttpClient, folder: Path) -> None:
    """C1: a team deploys its own connector service, for its own command topics."""
    for name in ("shop", "other"):
        (folder / f"{name}.yaml").write_text(GOOD.replace("connector: shop", f"connector: {name}"))
    assert set(load(http, folder)) == {"shop", "other"}
    assert set(load(http, folder, "other")) == {"other"}
    with pytest.raises(SettingsError, match="there are: odd, other, shop"):
        load(http, folder, "nix", plugins=[_Entry("odd", Plugin)])
    with pytest.raises(SettingsError, match="cannot be called 'notifier'"):
        load(http, folder, "notifier")
    with pytest.raises(SettingsError, match="no connector is declared"):
        load(http, None)


def test_a_plug_in_is_served_where_it_is_named(http: HttpClient, folder: Path) -> None:
    """C1, G8: a Python connector stands beside the YAML ones; installed alone it calls nobody."""
    (folder / "shop.yaml").write_text(GOOD)
    plugins = [_Entry("odd", Plugin)]
    assert set(load(http, folder, plugins=plugins)) == {"shop"}
    found = load(http, folder, "shop", "odd", plugins=plugins)
    assert isinstance(found["odd"], Plugin)
    assert entry("odd", "Plugin").group == catalogue.GROUP


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Broken, "cannot be made: RuntimeError"),
        (Nameless, "has no `name` 'odd'"),
        (Mistyped, "is not an Operation of that name"),
    ],
)
def test_a_broken_plug_in_does_not_start(http: HttpClient, kind: type, text: str) -> None:
    """C1: what the service will ask of it is checked at start; an exception's own text is not repeated."""
    with pytest.raises(SettingsError) as caught:
        load(http, None, "odd", plugins=[_Entry("odd", kind)])
    assert text in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_the_example_has_one_connector_of_each_strategy(http: HttpClient) -> None:
    """Issue 6: the example's three files load with nothing but addresses and tokens from the environment."""
    names = [path.stem for path in EXAMPLE.glob("*.yaml")]
    environ = {f"{n.upper()}_URL": "http://127.0.0.1:1" for n in names} | {f"{n.upper()}_TOKEN": "t" for n in names}
    found = load(http, EXAMPLE, environ=environ)
    effects = {name: o.strategy for c in found.values() for name, o in c.operations.items() if name[:4] != "find"}
    assert sorted(effects.values()) == sorted(Strategy)


def test_the_default_table_of_statuses() -> None:
    """C3: what a status means where nobody says otherwise; whatever is not known to have failed is ambiguous."""
    empty = declared.Errors()
    statuses = (400, 401, 404, 409, 429, 500, 502, 503, 599)
    found = {status: declared.class_of_status(status, empty) for status in statuses}
    assert found == {
        400: ErrorClass.VALIDATION, 401: ErrorClass.PERMISSION, 404: ErrorClass.NOT_FOUND, 409: ErrorClass.CONFLICT,
        429: ErrorClass.THROTTLED, 500: ErrorClass.AMBIGUOUS, 502: ErrorClass.AMBIGUOUS, 503: ErrorClass.TRANSIENT,
        599: ErrorClass.AMBIGUOUS,
    }  # fmt: skip
    assert all(declared.class_of_status(s, empty) is ErrorClass.AMBIGUOUS for s in range(300, 400))
