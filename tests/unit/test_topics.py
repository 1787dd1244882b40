"""The one table of topics: names there and back, each with its DLQ, its key and its readers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import topics
from factmesh.errors import SettingsError

NAMESPACES = st.sampled_from(["", "t1.", "a_b."])
CONNECTORS = st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True)


@given(NAMESPACES, CONNECTORS)
def test_a_name_leads_back_to_its_row(namespace: str, connector: str) -> None:
    """DESIGN 2: what a process reads from a topic's name is what the table says of it, in any namespace."""
    for topic in topics.TOPICS:
        name = topic.of(namespace, connector)
        assert name.startswith(namespace)
        assert topics.topic_of(name, namespace) in (topic, topics.COMMAND_NOTIFIER)
    name = topics.full_name(f"command.{connector}", namespace)
    assert topics.connector_of(name, namespace) == connector
    assert topics.connector_of(topics.full_name("fact", namespace), namespace) == ""


def test_short_names_are_the_only_way_to_a_topic() -> None:
    """A topic that the table does not hold has no key, DLQ or owner: it is refused, naming those there are."""
    assert topics.names(["fact", "result"], "n.") == ("n.factmesh.fact.v1", "n.factmesh.result.v1")
    with pytest.raises(SettingsError, match="facts.raw"):
        topics.full_name("facts")
    with pytest.raises(SettingsError, match="family"):
        topics.COMMAND.of()
    with pytest.raises(SettingsError):
        topics.full_name("command.")


def test_the_table_is_that_of_the_design() -> None:
    """DESIGN 2: who is keyed by the instance can park it even where nobody can read the bytes (H1)."""
    keyed = {t.short for t in topics.TOPICS if t.key_is_instance}
    assert keyed == {"command", "command.notifier", "result", "signal", "status"}
    assert len({t.name for t in topics.TOPICS}) == len(topics.TOPICS) == len(topics.BY_SHORT)
    assert all(t.producers and t.consumers for t in topics.TOPICS)


def test_a_dlq_copy_always_fits() -> None:
    """DESIGN 9: a DLQ allows more bytes than any origin, by more than the diagnosis can weigh."""
    assert topics.DLQ_BYTES_MAX > 2 * topics.VALUE_BYTES_MAX
    assert topics.DATA_BYTES_MAX * 2 < topics.VALUE_BYTES_MAX
    assert topics.dlq_of("n.facts.raw") == "dlq.n.facts.raw"
