"""What every service's command does first: import the service, and name the extra when something is not installed.
Every command is installed always, so this module imports nothing but the standard library until it is asked to.
"""

from __future__ import annotations

import importlib
import sys

EXIT_NOT_INSTALLED = 78


def run_service(name: str) -> None:
    """Run `factmesh_<name>.service.SERVICE`, or end with the one command that installs what it lacks."""
    try:
        service = importlib.import_module(f"factmesh_{name}.service").SERVICE
        run = importlib.import_module("factmesh.service").run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing.startswith("factmesh"):  # our own module: not an extra, a broken build
            raise
        sys.stderr.write(f"factmesh-{name} needs {missing}, not installed: pip install 'factmesh[{name}]'\n")
        sys.exit(EXIT_NOT_INSTALLED)
    run(service)
