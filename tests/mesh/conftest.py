"""One running mesh of real processes for the tests that only look at it: started once a session, over the stack."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import httpx2
import pytest
from tests.support.order_mesh import OrderMesh, TracedMesh, project_outside

from factmesh.stack import Stack


@pytest.fixture(scope="session")
async def order_mesh(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OrderMesh]:
    """The services and the sandbox over the process `order_exception`, in a folder outside of this repository."""
    folder = tmp_path_factory.mktemp("order_mesh")
    project = project_outside(folder)
    mesh = TracedMesh(folder / "run", stack, project, namespace=f"m{uuid.uuid4().hex[:8]}")
    try:
        await mesh.start()
        async with httpx2.AsyncClient(timeout=30.0) as client:
            yield OrderMesh(mesh, client, project)
    finally:
        await mesh.stop()
