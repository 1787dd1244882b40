"""The example's sandbox file says what the example's process relies on (issue 6 point 10)."""

from __future__ import annotations

from pathlib import Path

from factmesh_sandbox.config import load_config
from factmesh_sandbox.faults import expected

FILE = Path(__file__).parents[2] / "examples" / "customer_onboarding" / "sandbox.yaml"


def test_the_systems_honour_keys_or_not_as_the_strategies_need() -> None:
    """C2: one system for each strategy: keys honoured, naive with a look-up, naive without one."""
    systems = {system.name: system for system in load_config(FILE).systems}
    assert {name: system.idempotency for name, system in systems.items()} == {
        "risk": "honour",
        "crm": "naive",
        "helpdesk": "naive",
    }
    asks = {name for name, system in systems.items() if any(operation.lookup for operation in system.operations)}
    assert asks == {"crm"}


def test_a_thousand_facts_meet_every_fault_that_the_demo_promises() -> None:
    """Issue 6: among 1,000 sign-ups are 429, 500, resets, hangs and answers that never come."""
    file = load_config(FILE)
    met = {
        rule.fault
        for system, operation in (("risk", "check"), ("crm", "create_account"), ("helpdesk", "open_ticket"))
        for number in range(1000)
        if (rule := expected(file, system, operation, f"subject-{number}"))
    }
    assert {"throttled", "server_error", "reset_before", "reset_after", "hang", "no_answer", "unavailable"} <= met
