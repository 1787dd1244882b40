"""`python -m tests.model`: explores every model and writes the counterexamples into `docs/reliability-model.md`.
With a model's name, and a rule to switch off, it prints what exploring that one finds, and writes nothing.
"""

from __future__ import annotations

import sys

from tests.model.catalogue import MODELS, PAGE, RULES, filled, report


def main(arguments: list[str]) -> int:
    if arguments:
        name, *rules = arguments
        if name not in MODELS or any(rule not in MODELS[name].RULES for rule in rules) or len(rules) > 1:
            print(f"no such model or rule; the models are {', '.join(MODELS)}", file=sys.stderr)
            return 2
        seen = report(name, *rules)
        print(f"{seen.states} states, {seen.moves} moves, {seen.rests} at rest, {seen.seconds:.2f} s of CPU")
        print(seen.violation.text() if seen.violation is not None else "no promise is broken")
        return 0
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    reports = [*(report(name) for name in MODELS), *(report(name, rule) for name, rule in RULES)]
    print(
        f"{PAGE.name} written: {len(MODELS)} models, {len(RULES)} rules,"
        f" {sum(r.states for r in reports):,} states, {sum(r.seconds for r in reports):.1f} s of CPU"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
