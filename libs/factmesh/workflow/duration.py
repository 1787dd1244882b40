"""ISO 8601 durations of fixed length to seconds: weeks, days, hours, minutes, seconds.
No calendar lives here: a month and a year have no fixed length, so they are refused.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

PATTERN = r"^P(?!$)(\d+W)?(\d+D)?(T(?!$)(\d+H)?(\d+M)?(\d+(\.\d{1,3})?S)?)?$"
#: Longer than any audit period; a larger one is a typing error.
duration_s_max = 10 * 366 * 86400

_DURATION = re.compile(
    r"P(?!$)(?:(?P<weeks>\d{1,6})W)?(?:(?P<days>\d{1,6})D)?"
    r"(?:T(?!$)(?:(?P<hours>\d{1,6})H)?(?:(?P<minutes>\d{1,9})M)?(?:(?P<seconds>\d{1,9}(?:\.\d{1,3})?)S)?)?",
    re.ASCII,
)
_UNIT_S = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def duration_s(text: object) -> float:
    """Seconds of an ISO 8601 duration such as PT24H or P1DT12H. Raises ValueError saying what to write instead."""
    if not isinstance(text, str):
        raise ValueError("is not an ISO 8601 duration; write text such as PT30S, PT24H or P7D")
    found = _DURATION.fullmatch(text)
    if found is None:
        if re.match(r"P[^T]*\d+[YM]", text):
            raise ValueError(f"{text!r} counts years or months, which have no fixed length; write days, such as P30D")
        raise ValueError(f"{text!r} is not an ISO 8601 duration; write text such as PT30S, PT24H or P7D")
    seconds = sum(float(count) * _UNIT_S[unit] for unit, count in found.groupdict().items() if count)
    if not 0 < seconds <= duration_s_max:
        raise ValueError(f"{text!r} is not between a millisecond and {duration_s_max // 86400} days")
    return seconds


#: A field that is written as an ISO 8601 duration and read as seconds.
DurationS = Annotated[
    float, BeforeValidator(duration_s), WithJsonSchema({"type": "string", "pattern": PATTERN, "examples": ["PT24H"]})
]
