"""What the contract suites share: one real schema registry server for the session, emptied by fresh subject names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import registry_server


@pytest.fixture(scope="session")
def registry_url() -> Iterator[str]:
    """The address of a real server; the test is skipped, loudly, where there is no Go to build it."""
    try:
        with registry_server.running() as url:
            yield url
    except registry_server.NoServerError as error:
        pytest.skip(f"SKIPPED CONTRACT: {error}")
