"""What the tests of the mesh have in common: an impatient copy of the example, its generator, and a started mesh.
Nothing is judged here and nothing is killed here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from factmesh.stack import Stack
from factmesh_cli.demo_plan import Plan
from factmesh_cli.mesh import SERVICES, Mesh

EXAMPLE = Path(__file__).parents[2] / "examples" / "customer_onboarding"
TIMEOUT_S = 1.5
"""Every call, question and mail; leases are little more, so that what a killed process held comes back soon."""
IN_FLIGHT_S = 2
SLOW_S = 0.4


def impatient(folder: Path) -> Path:
    """A copy of the example with short timeouts and waits; everything else is as it is."""
    project = folder / "project"
    shutil.copytree(EXAMPLE, project)
    changes = (
        (r"(\btimeout_s): \d+", rf"\1: {TIMEOUT_S}"),
        (r"(\bin_flight_max_s): \d+", rf"\1: {IN_FLIGHT_S}"),
        (r"(\bbase_s): [\d.]+", r"\1: 0.3"),
        (r"(\bdelay_max_s): \d+", r"\1: 4"),
    )
    for file in (*project.glob("connectors/*.yaml"), *project.glob("policies/*.yaml"), project / "channels.yaml"):
        text = file.read_text(encoding="utf-8")
        for pattern, replacement in changes:
            text = re.sub(pattern, replacement, text)
        file.write_text(text, encoding="utf-8")
    sandbox = project / "sandbox.yaml"
    text = sandbox.read_text(encoding="utf-8")
    # Half of the subjects are served slowly, so that whenever somebody is killed or stopped, calls are in flight.
    slow = f"{{fault: slow, share: 0.5, delay_s: {SLOW_S}}}"
    sandbox.write_text(re.sub(r"( +)faults:\n", rf"\g<0>\1  - {slow}\n", text), encoding="utf-8")
    return project


def generate(project: Path, count: int, seed: int) -> Plan:
    """The project's own generator."""
    spec = importlib.util.spec_from_file_location("generator", project / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plan: Plan = module.plan(count, seed, project)
    return plan


@contextlib.asynccontextmanager
async def started(
    stack: Stack,
    namespace: str,
    *,
    services: Sequence[str] = SERVICES,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Mesh]:
    """A mesh of its own namespace over the impatient project, in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="fm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        project = impatient(Path(folder))
        mesh = Mesh(Path(folder) / "run", stack, project, namespace, dict(settings or {}))
        try:
            await mesh.start(services)
            yield mesh
        finally:
            await mesh.stop()
