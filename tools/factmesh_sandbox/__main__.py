"""The command `factmesh-sandbox`: reads its arguments, names what is missing or wrong, and serves.
Nothing else is decided here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 2 when it cannot start as asked."""
    arguments = _parser().parse_args(argv)
    try:
        from factmesh.errors import FactmeshError
        from factmesh_sandbox.config import load_config
        from factmesh_sandbox.model import SandboxFile
        from factmesh_sandbox.serve import Options, run
    except ModuleNotFoundError as error:
        print(f"factmesh-sandbox needs {error.name}: pip install 'factmesh[sandbox]'", file=sys.stderr)
        return 2
    if arguments.schema:
        print(json.dumps(SandboxFile.model_json_schema(), indent=2))
        return 0
    if arguments.config is None or (arguments.log is None and not arguments.check):
        print("factmesh-sandbox: give --config FILE and --log FILE.sqlite (or --check, --schema)", file=sys.stderr)
        return 2
    try:
        file = load_config(arguments.config)
        if arguments.check:
            print(f"{arguments.config}: {', '.join(file.names())}: ok")
            return 0
        options = Options(arguments.log, arguments.host, arguments.http_port, arguments.smtp_port, arguments.announce)
        asyncio.run(run(file, options))
    except FactmeshError as error:
        print(f"factmesh-sandbox: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="factmesh-sandbox", description="External systems with switchable faults, declared in YAML, and a log."
    )
    parser.add_argument("--config", type=Path, help="the sandbox file")
    parser.add_argument("--log", type=Path, help="the SQLite file for calls, effects, mails and webhooks")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default %(default)s)")
    parser.add_argument("--http-port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--smtp-port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--announce", type=Path, help="write the ports and addresses to this JSON file")
    parser.add_argument("--check", action="store_true", help="only check the sandbox file")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of sandbox files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
