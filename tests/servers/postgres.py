"""A real PostgreSQL for tests, on loopback. Debian: `apt-get install postgresql`."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PASSWORD = "planted-password-of-postgres"


@dataclass(frozen=True)
class Postgres:
    """A running server with an empty database `dagster`."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What deploy/dagster.yaml reads."""
        names = {"HOST": "127.0.0.1", "USER": "dagster", "PASSWORD": PASSWORD, "DB": "dagster", "PORT": str(self.port)}
        return {f"DAGSTER_POSTGRES_{name}": value for name, value in names.items()}


def programs() -> Path | None:
    """Where Debian keeps them, the newest version's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


def missing() -> str | None:
    return None if programs() else "postgresql"


@contextmanager
def running() -> Iterator[Postgres]:
    """A server until the context ends. It refuses to run as root, so then it runs as the user `postgres`."""
    with TemporaryDirectory(prefix="postgres-") as folder:  # not pytest's, which are closed to other users
        yield from _in_folder(Path(folder))


def _in_folder(folder: Path) -> Iterator[Postgres]:
    where = programs()
    assert where
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, secret = folder / "data", folder / "password"
    secret.write_text(PASSWORD)
    own: dict[str, Any] = {"cwd": folder, "check": True, "capture_output": True}
    if os.getuid() == 0:
        own |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        for path in (folder, secret):
            shutil.chown(path, "postgres")
    initdb = [where / "initdb", "-D", data, "-U", "dagster", "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8"]
    subprocess.run(initdb, **own)
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
    flags = " ".join(f"-c {name}={value}" for name, value in settings.items())
    control = [where / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", flags, "start"], **own)
    try:
        create = [where / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "dagster", "dagster"]
        subprocess.run(create, check=True, capture_output=True, env={**os.environ, "PGPASSWORD": PASSWORD})
        yield Postgres(port)
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **own)
