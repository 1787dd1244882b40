"""Which fault strikes whom is known beforehand and never changes (G5)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh.errors import DefinitionError
from factmesh.yaml import parse
from factmesh_sandbox.config import parse_config, parse_rules
from factmesh_sandbox.faults import expected, pick
from factmesh_sandbox.model import FaultRule, SandboxFile
from factmesh_sandbox.template import render
from factmesh_sandbox.webhooks import refusal, sign

FILE = """
sandbox: 1
seed: 7
systems:
  - name: shop
    operations:
      - {name: buy, method: POST, path: /orders, subject: body.id, effect: order}
    faults:
      - {fault: no_answer, share: 0.1, attempts: 1}
      - {fault: hang, share: 0.1, attempts: 2}
"""


def load(text: str) -> SandboxFile:
    return parse_config(parse(text, file="sandbox.yaml"))


def test_shares_hit_their_part_of_the_subjects_and_no_subject_twice() -> None:
    """G5: a share of 10 % is 10 % of the subjects, and the shares of one system never overlap."""
    file = load(FILE)
    hit = [expected(file, "shop", "buy", f"s{n}") for n in range(10_000)]
    kinds = [rule.fault if rule else None for rule in hit]
    assert 900 < kinds.count("no_answer") < 1100
    assert 900 < kinds.count("hang") < 1100


def test_attempts_limit_a_rule_to_the_first_ones() -> None:
    """G5: `attempts: N` strikes a subject's first N attempts, then lets it through."""
    file = load(FILE)
    for n in range(500):
        first = expected(file, "shop", "buy", f"s{n}", 1)
        second = expected(file, "shop", "buy", f"s{n}", 2)
        assert expected(file, "shop", "buy", f"s{n}", 3) is None
        assert second == (first if first and first.fault == "hang" else None)


@given(st.text(max_size=20), st.integers(1, 50), st.integers(0, 2**32))
def test_the_same_question_has_the_same_answer(subject: str, attempt: int, seed: int) -> None:
    """G5: a run is repeatable: the decision depends on seed, subject and attempt; probability 1 always strikes."""
    rules = (FaultRule(fault="slow", probability=0.5), FaultRule(fault="hang", probability=1.0))
    answers = {
        pick(rules, seed=seed, system="a", operation="b", subject=subject, attempt=attempt).fault  # type: ignore[union-attr]
        for _ in range(3)
    }
    assert len(answers) == 1


def test_the_seed_chooses_other_subjects() -> None:
    """G5: another seed is another run."""
    rules = (FaultRule(fault="hang", share=0.5),)

    def hits(seed: int) -> list[bool]:
        asked = (pick(rules, seed=seed, system="a", operation="b", subject=str(n), attempt=1) for n in range(200))
        return [rule is not None for rule in asked]

    assert hits(1) == hits(1)
    assert hits(1) != hits(2)


def test_rules_name_operations_and_subjects() -> None:
    """G5: a rule can be aimed at one operation or at named subjects; everybody else is left alone."""
    rules = (
        FaultRule(fault="hang", operations=("buy",), subjects=("x",)),
        FaultRule(fault="throttled", operations=("ask",)),
    )

    def fault(operation: str, subject: str) -> str | None:
        rule = pick(rules, seed=0, system="a", operation=operation, subject=subject, attempt=9)
        return rule.fault if rule else None

    assert [fault("buy", "x"), fault("buy", "y"), fault("ask", "x")] == ["hang", None, "throttled"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("share: 0.1, attempts: 2", "share: 0.95"), "the shares add up to 1.05"),
        (("fault: hang", "fault: hangs"), "sandbox.yaml:10"),
        (("fault: hang", "fault: reject_permanent"), "cannot strike here"),
        (("share: 0.1, attempts: 1", "share: 0.1, probability: 0.2"), "at most one of share, probability and subjects"),
        (("attempts: 2", "operations: [sell]"), "operations that do not exist: sell"),
        (("subject: body.id", "subject: bdy.id"), "'bdy.id' is no path"),
        (("effect: order}", "effect: order, response: {id: '{efect.id}'}}"), "'efect.id' is no path"),
        ((", effect: order}", "}"), "needs either `effect` or `lookup`"),
        (("seed: 7", "sed: 7"), "Extra inputs are not permitted"),
        (("seed: 7", "seed: 7\nseed: 8"), "twice"),
        (("name: shop", "name: mail"), "must differ"),
        (("sandbox: 1", "sandbox: 2"), "Input should be 1"),
    ],
)
def test_a_bad_file_is_refused_with_what_and_where(change: tuple[str, str], says: str) -> None:
    """G5: a mistake in a sandbox file is an error that says what and where, never a fault switched off in silence."""
    with pytest.raises(DefinitionError) as caught:
        load(FILE.replace(*change, 1))
    assert says in str(caught.value)
    assert "sandbox.yaml" in str(caught.value)


def test_rules_from_the_admin_api_are_checked_too() -> None:
    """G5: rules given at run time are judged as strictly as the file's."""
    assert parse_rules({"rules": [{"fault": "hang"}]}) == (FaultRule(fault="hang"),)
    with pytest.raises(ValueError, match="rule 0: share: Input should be less than or equal to 1"):
        parse_rules([{"fault": "hang", "share": 2}])
    with pytest.raises(ValueError, match="give a list"):
        parse_rules("hang")


def test_text_from_a_request_is_never_a_template() -> None:
    """A2: what came in as data is put in as it is, not evaluated again; a whole placeholder keeps its type."""
    scope = {"body": {"name": "{headers.authorization}", "n": 3}, "headers": {"authorization": "secret"}}
    assert render({"hello": "x {body.name}", "n": "{body.n}", "none": "{body.no}"}, scope) == {
        "hello": "x {headers.authorization}",
        "n": 3,
        "none": None,
    }


def test_webhook_signatures_follow_the_standard() -> None:
    """D1: the signature is that of Standard Webhooks (id.timestamp.body, HMAC-SHA256 under the decoded secret)."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    given_ = {"webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek", "webhook-timestamp": "1614265330"}
    # The example vector that the specification's reference implementations are tested with.
    wanted = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert sign(secret, given_["webhook-id"], 1614265330, body) == wanted
    good = {**given_, "webhook-signature": f"v1,AAAA {wanted}"}
    assert refusal(secret, good, body, now_epoch_s=1614265330, tolerance_s=300) is None
    assert "does not match" in str(refusal(secret, good, body + b" ", now_epoch_s=1614265330, tolerance_s=300))
    assert "away from now" in str(refusal(secret, good, body, now_epoch_s=1614265999, tolerance_s=300))
    assert "needed" in str(refusal(secret, given_, body, now_epoch_s=1614265330, tolerance_s=300))
