"""The gateway to secrets: references (`ref+file://`, `ref+env://`) in, values that do not show themselves out.
Only connector and channel configuration is resolved here; expressions, logs and DLQ records never see a value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from factmesh.errors import ErrorClass, SettingsError

PREFIX = "ref+"
SECRET_BYTES_MAX = 64 * 1024
MASK = "***"


class SecretError(SettingsError):
    """A reference that cannot be resolved: who needs it does not start."""

    error_class = ErrorClass.VALIDATION


class Secret:
    """A resolved value. `str`, `repr`, formatting and pickling never give it away; `reveal()` does, at the edge."""

    __slots__ = ("_value", "reference")

    def __init__(self, value: str, reference: str) -> None:
        self._value = value
        self.reference = reference

    def reveal(self) -> str:
        """The value, for the one place that sends it."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({self.reference}, {MASK})"

    def __str__(self) -> str:
        return MASK

    def __format__(self, spec: str) -> str:
        return format(MASK, spec)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(f"the secret {self.reference} is not serialised: pass the reference on")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self.reference)


def is_reference(text: str) -> bool:
    """Whether a configuration value is a reference rather than a plain value."""
    return text.startswith(PREFIX)


def resolve(reference: str, *, environ: Mapping[str, str] | None = None, where: str = "") -> Secret:
    """The secret that `ref+env://NAME` or `ref+file:///path` names. Raises SecretError, naming the reference only.

    A file's trailing line break is not part of the secret: editors and `kubectl create secret` add one.
    """
    scheme, separator, rest = reference.removeprefix(PREFIX).partition("://")
    if not is_reference(reference) or not separator:
        # The text itself is not repeated: it may be the secret, written where a reference belongs.
        raise SecretError(
            "is not a secret reference", where=where, hint="write ref+env://NAME or ref+file:///path, never a value"
        )
    if scheme == "env":
        value = (os.environ if environ is None else environ).get(rest)
        if value is None:
            raise _unresolved(reference, where, f"the environment variable {rest} is not set", f"set {rest}")
    elif scheme == "file":
        value = _read(reference, Path(rest), where)
    elif scheme == "vault":
        raise _unresolved(
            reference, where, "Vault is not supported in this version", "mount it as a file: ref+file://"
        )
    else:
        raise _unresolved(reference, where, f"scheme {scheme!r} is not known", "use ref+env:// or ref+file://")
    if not value.strip():
        raise _unresolved(reference, where, "it is empty", "put the secret there")
    return Secret(value, reference)


def resolve_text(text: str, *, environ: Mapping[str, str] | None = None, where: str = "") -> str:
    """A plain value as it is, a reference resolved: for addresses, which differ by environment and are no secret."""
    return resolve(text, environ=environ, where=where).reveal() if is_reference(text) else text


def _read(reference: str, path: Path, where: str) -> str:
    if not path.is_absolute():
        raise _unresolved(reference, where, "the path is not absolute", "write ref+file:///path")
    try:
        with path.open("rb") as stream:
            raw = stream.read(SECRET_BYTES_MAX + 1)
    except OSError as error:
        raise _unresolved(
            reference, where, f"the file cannot be read: {error.strerror}", "check the path and its permissions"
        ) from None
    if len(raw) > SECRET_BYTES_MAX:
        raise _unresolved(reference, where, f"the file has more than {SECRET_BYTES_MAX} bytes", "is it the right one?")
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise _unresolved(reference, where, "the file is not UTF-8 text", "store the secret as text") from None


def _unresolved(reference: str, where: str, problem: str, hint: str) -> SecretError:
    return SecretError(f"secret {reference} cannot be resolved: {problem}", where=where, hint=hint)
