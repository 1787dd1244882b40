"""Running meshes of real processes over the stack: one a session to look at, and one to throw junk at."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from tests.support.order_mesh import OrderMesh, TracedMesh, project_outside

from factmesh.stack import Stack


async def _running(stack: Stack, folder: Path) -> AsyncIterator[OrderMesh]:
    """The services and the sandbox over the process `order_exception`, in a folder outside of this repository."""
    project = project_outside(folder)
    mesh = TracedMesh(folder / "run", stack, project, namespace=f"m{uuid.uuid4().hex[:8]}")
    try:
        await mesh.start()
        async with httpx2.AsyncClient(timeout=30.0) as client:
            yield OrderMesh(mesh, client, project)
    finally:
        await mesh.stop()


@pytest.fixture(scope="session")
async def order_mesh(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OrderMesh]:
    """For tests that only look at it, and read its topics whole: nobody publishes anything wrong there but facts."""
    async for running in _running(stack, tmp_path_factory.mktemp("order_mesh")):
        yield running


@pytest.fixture(scope="module")
async def junk_mesh(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OrderMesh]:
    """For tests that put junk on every topic."""
    async for running in _running(stack, tmp_path_factory.mktemp("junk_mesh")):
        yield running
