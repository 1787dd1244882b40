"""One depot for all tests of the ways back: each test has parcels of its own, and faults that strike only them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.support.ways_back import Depot, open_depot

from factmesh.stack import Stack


@pytest.fixture(scope="session")
async def depot(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Depot]:
    """Real processes over the process `parcel`; the connector does not know the operation `stamp`."""
    async with open_depot(stack, tmp_path_factory.mktemp("depot")) as opened:
        yield opened
