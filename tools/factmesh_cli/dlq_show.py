"""How the tool prints records, groups, plans and figures: tables for people, one JSON document for programs.
Printing only; everything is given. Text from messages is escaped, so that no payload can draw on the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from rich import markup
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from factmesh.ids import Root
from factmesh.message import unpack, unpack_delivery
from factmesh.postgres import Record
from factmesh.registry import Registry
from factmesh_cli import dlq_edit
from factmesh_cli.dlq_operate import Planned

SHORT = 13
"""Characters of an id in tables: enough to tell thousands apart, and accepted wherever an id is."""
_BYTES = ("original", "correction", "root")


def console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def visible(text: str) -> str:
    """Control characters as people can see them: an escape sequence in a stranger's header does nothing here."""
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else f"\\x{ord(c):02x}" for c in text)


def escape(text: str) -> str:
    """Text of a message for the console: neither markup nor control characters act."""
    return markup.escape(visible(text))


def plain(value: Any) -> Any:
    """JSON-plain."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    return value


def as_json(row: Record) -> dict[str, Any]:
    """A record's row without its bytes; the root as text."""
    out = {k: plain(v) for k, v in row.items() if k not in _BYTES}
    out["record_id"] = out.pop("thread")
    out["group"] = out.pop("grp")
    out["root"] = bytes(row["root"]).decode("utf-8", "replace")
    out["corrected"] = row["correction"] is not None
    key = unpack_delivery(row["original"]).key if row["original"] is not None else None
    out["key"] = key.decode("utf-8", "replace") if key is not None else None
    return out


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def _age(at: datetime, now: datetime) -> str:
    seconds = max(0, int((now - at).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def records_table(rows: Sequence[Record], now: datetime) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("ID", "STATE", "REASON", "TOPIC", "STEP", "AGE", "OPENING", "CAUSE", "MESSAGE"):
        table.add_column(name, overflow="fold" if name == "MESSAGE" else "ellipsis", no_wrap=name != "MESSAGE")
    for r in rows:
        table.add_row(
            str(r["id"])[:SHORT],
            r["state"] + ("*" if r["correction"] is not None else ""),
            r["reason"],
            escape(r["topic"]),
            escape(r["step"] or "-"),
            _age(r["failed_at"], now),
            str(r["raised"]),
            r["fingerprint"][:8],
            escape(r["message"][:160]),
        )
    return table


def groups_table(rows: Sequence[Record], now: datetime) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("RECORDS", "CAUSE", "REASON", "STAGE", "STEP", "OLDEST", "NEWEST", "EXAMPLE"):
        table.add_column(name, justify="right" if name == "RECORDS" else "left", no_wrap=name != "EXAMPLE")
    for r in rows:
        table.add_row(
            str(r["records"]),
            r["fingerprint"],
            r["reason"],
            escape(r["stage"]),
            escape(r["step"] or "-"),
            _age(r["oldest"], now),
            _age(r["newest"], now),
            escape(r["example"][:160]),
        )
    return table


_FACTS = (
    ("state", "state"),
    ("owner", "owner"),
    ("reason", "reason"),
    ("error class", "error_class"),
    ("exception", "exception_type"),
    ("message", "message"),
    ("cause", "fingerprint"),
    ("stage", "stage"),
    ("step", "step"),
    ("attempts", "attempts"),
    ("first failed", "first_failed_at"),
    ("last failed", "failed_at"),
    ("service", "service_version"),
    ("instance", "instance_id"),
    ("command", "command_id"),
    ("correlation", "correlation_id"),
    ("trace", "trace_id"),
    ("workflow", "workflow"),
    ("business object", "business_object_id"),
    ("corrected by", "corrected_by"),
)


_WAYS = {
    "opening": "`factmesh dlq replay {id}` sends it again, `factmesh dlq correct {id}` changes it before",
    "retry_step": "`factmesh dlq replay {id}` runs its step again, under a new key",
    "resolution": "find out, then `factmesh dlq resolve {id} --happened OUTPUT`, or `--not-happened`",
}


async def show(
    out: Console, registry: Registry, row: Record, history: Iterable[Record], acts: Iterable[Record], way: str
) -> None:
    """One record: what is known of it, its headers, its decoded value, the correction, and its history."""
    out.print(f"[bold]record {row['id']}[/bold]")
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_row("at", escape(f"{row['topic']}[{row['partition']}]@{row['offset']}"))
    facts.add_row("root", escape(Root(bytes(row["root"]).decode("utf-8", "replace")).text))
    for label, column in _FACTS:
        if row[column] is not None:
            facts.add_row(label, escape(str(plain(row[column]))))
    facts.add_row("openings", f"raised {row['raised']}, published {row['published']}, dead {row['dead']}")
    facts.add_row("at its instance", f"{row['thread']}")
    facts.add_row("way back", f"{way}: {_WAYS[way].format(id=str(row['id'])[:SHORT])}")
    out.print(facts)
    if row["stack"]:
        out.print("\n[bold]stack[/bold]\n" + escape(row["stack"]))
    if row["original"] is None:
        out.print("\nits bytes are past their retention")
    else:
        await _show_bytes(out, registry, row)
    out.print("\n[bold]history[/bold]")
    for h in history:
        what = f"{h['event']} (opening {h['number']}) {h['before'] or '-'} -> {h['after']}"
        out.print(escape(f"  {plain(h['at'])}  {h['by']}: {what}  {h['detail']}"))
    due = [a for a in acts if a["published_at"] is None]
    if due:
        out.print(f"  {len(due)} act(s) are due: stored, not published yet")


async def _show_bytes(out: Console, registry: Registry, row: Record) -> None:
    original = unpack_delivery(row["original"])
    seen = await dlq_edit.view(registry, original.value)
    key = dlq_edit.headers_text((("key", original.key),))
    out.print(f"\n[bold]headers[/bold]\n{escape(key)}\n{escape(dlq_edit.headers_text(original.headers))}")
    out.print(f"\n[bold]value[/bold] ({escape(seen.label)})")
    if seen.trouble:
        out.print(escape(seen.trouble))
    out.print(escape(dlq_edit.pretty(seen)))
    if row["correction"] is not None:
        (e,) = unpack(row["correction"])
        out.print("\n[bold]correction[/bold]")
        print_diff(out, await changes(registry, original.value, original.headers, e.value, e.headers))


async def changes(
    registry: Registry, value: bytes | None, headers: Any, to: bytes | None, to_headers: Any
) -> list[str]:
    """The diff of a correction: value and headers."""
    before, after = await dlq_edit.view(registry, value), await dlq_edit.view(registry, to)
    return dlq_edit.diff(dlq_edit.pretty(before), dlq_edit.pretty(after), "value") + dlq_edit.diff(
        dlq_edit.headers_text(headers), dlq_edit.headers_text(to_headers), "headers"
    )


def print_diff(out: Console, lines: Sequence[str]) -> None:
    out.print(Syntax(visible("\n".join(lines)), "diff", background_color="default") if lines else "nothing changes")


def plan_table(plans: Sequence[Planned]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("ID", "WOULD", "PUBLISHES", "BYTES", "WHY NOT"):
        table.add_column(name, no_wrap=name != "WHY NOT")
    for p in plans:
        table.add_row(
            str(p.row["id"])[:SHORT],
            p.what,
            escape(", ".join(e.topic for e in p.emissions) or "-"),
            str(sum(len(e.value or b"") for e in p.emissions)),
            escape(p.refused),
        )
    return table


def plan_json(plans: Sequence[Planned]) -> list[dict[str, Any]]:
    return [
        {
            "id": str(p.row["id"]),
            "would": p.what,
            "publishes": [{"topic": e.topic, "bytes": len(e.value or b"")} for e in p.emissions],
            "refused": p.refused or None,
        }
        for p in plans
    ]


def stats_table(figures: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("OWNER", "OPEN", "FAILED AGAIN", "REPLAYED", "RESOLVED", "DISCARDED"):
        table.add_column(name, justify="left" if name == "OWNER" else "right")
    for owner, states in figures["owners"].items():
        counts = (states.get(s, 0) for s in ("open", "failed_again", "replayed", "resolved", "discarded"))
        table.add_row(escape(owner), *(str(n) for n in counts))
    return table
