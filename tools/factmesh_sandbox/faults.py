"""Which fault strikes which attempt: a pure function of seed, system, operation, subject and attempt number.
No state and no randomness: a generator asks the same function beforehand and knows what will be hit.
"""

from __future__ import annotations

from hashlib import blake2b

from factmesh_sandbox.model import FaultRule, SandboxFile


def point(*parts: str | int) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    text = "\x1f".join(str(part) for part in parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=7).digest(), "big") / 2**56


def pick(
    rules: tuple[FaultRule, ...], *, seed: int, system: str, operation: str, subject: str, attempt: int
) -> FaultRule | None:
    """The rule that strikes this attempt (counted from 1), or None. The first rule that hits is taken."""
    where = point(seed, system, subject)
    slice_start = 0.0
    for index, rule in enumerate(rules):
        slice_end = slice_start + (rule.share or 0.0)
        if rule.share is not None:
            hit = slice_start <= where < slice_end
        elif rule.probability is not None:
            hit = point(seed, system, operation, index, subject, attempt) < rule.probability
        else:
            hit = not rule.subjects or subject in rule.subjects
        slice_start = slice_end
        if hit and (rule.attempts is None or attempt <= rule.attempts) and _meant(rule, operation):
            return rule
    return None


def expected(file: SandboxFile, system: str, operation: str, subject: str, attempt: int = 1) -> FaultRule | None:
    """What the file's own rules will do to this attempt; the prediction that a generator writes into its own log."""
    return pick(
        file.rules_of(system), seed=file.seed, system=system, operation=operation, subject=subject, attempt=attempt
    )


def _meant(rule: FaultRule, operation: str) -> bool:
    return not rule.operations or operation in rule.operations
