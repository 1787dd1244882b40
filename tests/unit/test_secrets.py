"""References to secrets: resolved at the edge, refused with a clear text, and never shown."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from factmesh import secrets
from factmesh.secrets import Secret, SecretError, resolve, resolve_text

VALUE = "s3cr3t-value"


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def test_environment_and_files_are_resolved(folder: Path) -> None:
    """G4: from the environment as it is; from a file without the line break that editors add."""
    (folder / "token").write_text(VALUE + "\n")
    assert resolve("ref+env://TOKEN", environ={"TOKEN": VALUE}).reveal() == VALUE
    assert resolve(f"ref+file://{folder}/token").reveal() == VALUE
    assert resolve_text("http://plain") == "http://plain"
    assert resolve_text("ref+env://URL", environ={"URL": "http://there"}) == "http://there"


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("ref+env://NOT_SET", "NOT_SET is not set"),
        ("ref+env://EMPTY", "it is empty"),
        ("ref+file:///no/such/file", "cannot be read"),
        ("ref+file://relative", "not absolute"),
        ("ref+vault://kv/app#/token", "Vault is not supported in this version"),
        ("ref+s3://x", "scheme 's3' is not known"),
    ],
)
def test_what_cannot_be_resolved_is_named(reference: str, text: str) -> None:
    """Issue 6, bad input: the reference, what is wrong with it, and where it stands."""
    with pytest.raises(SecretError) as caught:
        resolve(reference, environ={"EMPTY": " "}, where="shop.yaml:3")
    assert text in str(caught.value)
    assert reference in str(caught.value)
    assert str(caught.value).startswith("shop.yaml:3: ")


def test_a_value_where_a_reference_belongs_is_refused_and_not_repeated() -> None:
    """F5: somebody who writes the secret itself into the file does not find it in the log."""
    with pytest.raises(SecretError, match="not a secret reference") as caught:
        resolve(VALUE)
    assert VALUE not in str(caught.value)


def test_a_large_or_binary_file_is_no_secret(folder: Path) -> None:
    """Bounds: a mistaken path is told as such."""
    (folder / "large").write_bytes(b"x" * (secrets.SECRET_BYTES_MAX + 1))
    (folder / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SecretError, match="more than"):
        resolve(f"ref+file://{folder}/large")
    with pytest.raises(SecretError, match="not UTF-8"):
        resolve(f"ref+file://{folder}/binary")


def test_a_secret_does_not_show_itself(caplog: pytest.LogCaptureFixture) -> None:
    """F5: not by str, repr, formatting, logging, pickling or copying."""
    secret = Secret(VALUE, "ref+env://TOKEN")
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("%s %r %s", secret, secret, [secret])
    shown = f"{secret} {secret!r} {secret:>10} {[secret]} {caplog.text}"
    assert VALUE not in shown
    assert "ref+env://TOKEN" in shown
    for serialise in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="is not serialised"):
            serialise(secret)
    assert secret == Secret(VALUE, "ref+env://OTHER")
