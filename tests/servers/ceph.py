"""A real S3 server for tests: Ceph's RADOS gateway over one monitor and one object store daemon, on loopback.

Debian: `apt-get install radosgw ceph-mon ceph-osd ceph-common`. All files are in one folder, and it runs as this user.

It takes smaller parts of an upload than S3 does, so that tests of several parts need few bytes.

`shared` gives all test processes of one session the same server. A process of its own keeps it, and stops it as soon as
no user is left: each of them holds a lock on a file, which the kernel releases however the user ends. The daemons die
with their keeper.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
ACCESS_KEY, SECRET_KEY = "AKPLANTEDACCESSKEY01", "planted-secret-key-for-tests-0123456789"
START_SECONDS = 120
POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1

CONF = """
[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{mon}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
run_dir = {folder}
admin_socket =
log_file = {folder}/$name.log
log_to_stderr = false
mon_cluster_log_file = {folder}/cluster.log
mon_allow_pool_size_one = true
mon_data_avail_crit = 1
mon_data_avail_warn = 1
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_crush_initial_weight = 1
mon_osd_full_ratio = 0.99
mon_osd_nearfull_ratio = 0.98
osd_objectstore = bluestore
bluestore_block_size = 32212254720
bluestore_block_wal_create = false
bluestore_fsck_on_mount = false
osd_memory_target = 939524096
osd_memory_cache_min = 134217728
ms_bind_ipv6 = false

[mon.a]
mon_data = {folder}/mon

[osd.0]
osd_data = {folder}/osd

[client.rgw]
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
rgw_multipart_min_part_size = 65536
rgw_gc_obj_min_wait = 5
rgw_gc_processor_period = 5
"""


@dataclass
class Ceph:
    """A running server.

    Attributes:
        url: Where it answers.
        folder: What it keeps.
        processes: Its daemons.
    """

    url: str
    folder: Path
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)


def environment(url: str) -> dict[str, str]:
    """What a client needs of the environment."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def missing() -> str | None:
    """The first program that is not installed, or None."""
    return next((name for name in PROGRAMS if not shutil.which(name)), None)


@contextmanager
def running(folder: Path) -> Iterator[Ceph]:
    """A server on 127.0.0.1 until the context ends.

    Args:
        folder: Empty; on a disk with room for what is stored.
    """
    ports = _free_ports(2)
    server = Ceph(f"http://127.0.0.1:{ports[1]}", folder)
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    conf, fsid = folder / "ceph.conf", str(uuid.uuid4())
    conf.write_text(CONF.format(fsid=fsid, mon=ports[0], port=ports[1], folder=folder))
    try:
        _start(server, conf, fsid, ports[0])
        yield server
    finally:
        for process in reversed(server.processes):
            process.send_signal(signal.SIGKILL)
            process.wait()


@contextmanager
def shared(folder: Path) -> Iterator[str]:
    """The URL of the one server that all processes with this folder use; the first of them starts it.

    Args:
        folder: The same for all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "users", "wb") as users:
        with FileLock(folder / "start.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)  # a server that is about to stop has stopped before this returns
            if not (folder / "url").exists():
                _start_keeper(folder)
        yield (folder / "url").read_text()


def _start_keeper(folder: Path) -> None:
    with open(folder / "keeper.out", "ab") as out:
        keeper = subprocess.Popen(
            [sys.executable, __file__, str(folder), "--shared"], stdout=out, stderr=out, start_new_session=True
        )
    while not (folder / "url").exists():
        if keeper.poll() is not None:
            raise RuntimeError(f"no S3 server was started; see {folder / 'keeper.out'}")
        time.sleep(0.1)


def _keep(folder: Path) -> None:
    """Run a server until no process holds its lock on the file `users`."""
    data, url = folder / uuid.uuid4().hex[:8], folder / "url"
    with open(folder / "users", "wb") as users:
        with running(data) as server:
            ready = folder / "url.new"
            ready.write_text(server.url)
            ready.rename(url)
            while not _locked(users.fileno()):
                time.sleep(POLL_SECONDS)
            url.unlink()
        shutil.rmtree(data / "osd")  # as large as all that was stored; the logs stay


def _locked(file: int) -> bool:
    """Lock a file if nobody else has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _start(server: Ceph, conf: Path, fsid: str, port: int) -> None:
    folder, deadline = server.folder, time.monotonic() + START_SECONDS
    monmap = folder / "monmap"
    address = f"[v1:127.0.0.1:{port}]"
    _run(conf, "monmaptool", "--create", "--clobber", "--addv", "a", address, "--fsid", fsid, str(monmap))
    _run(conf, "ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monmap))
    _daemon(server, conf, "ceph-mon", "-i", "a")
    _run(conf, "ceph", "osd", "new", str(uuid.UUID(int=1)), deadline=deadline)
    _run(conf, "ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", str(uuid.UUID(int=1)))
    _osd(server, conf, deadline)
    _daemon(server, conf, "radosgw", "-n", "client.rgw")
    user = ("user", "create", "--uid=tests", "--display-name=tests")
    keys = (f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
    _run(conf, "radosgw-admin", "-n", "client.rgw", *user, *keys, deadline=deadline)
    while not _answers(server.url):
        if time.monotonic() > deadline or server.processes[-1].poll() is not None:
            raise RuntimeError(f"radosgw did not start; see {folder}")
        time.sleep(0.2)


def _daemon(server: Ceph, conf: Path, *command: str) -> None:
    with open(server.folder / f"{command[0]}.out", "wb") as out:
        arguments = [*command, "-f", "--conf", str(conf)]
        server.processes.append(
            subprocess.Popen(arguments, stdout=out, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent)
        )


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _osd(server: Ceph, conf: Path, deadline: float) -> None:
    """Start the OSD, again where it asks the monitor for its place before it has the monitor's map.

    Then it is told "wrong fsid" and ends, about once in four starts.
    """
    log = server.folder / "osd.0.log"
    while True:
        _daemon(server, conf, "ceph-osd", "-i", "0")
        while server.processes[-1].poll() is None:
            if log.exists() and "done with init" in log.read_text(errors="replace"):
                return
            time.sleep(0.1)
        if time.monotonic() > deadline:
            raise RuntimeError(f"ceph-osd did not start; see {server.folder}")
        server.processes.pop()


def _run(conf: Path, *command: str, deadline: float | None = None) -> None:
    """Run to success, again and again until `deadline` if one is given."""
    arguments = [*command, "--conf", str(conf)]
    while True:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=START_SECONDS, check=False)
        if done.returncode == 0:
            return
        if deadline is None or time.monotonic() > deadline:
            raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
        time.sleep(0.5)


def _answers(url: str) -> bool:
    port = int(url.rpartition(":")[2])
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def main() -> None:
    """Run one until Ctrl-C, and print what a client needs: `python tests/servers/ceph.py FOLDER`."""
    folder = Path(sys.argv[1]).resolve()
    if "--shared" in sys.argv:
        return _keep(folder)
    with running(folder) as server:
        print(json.dumps(environment(server.url)), flush=True)
        signal.pause()


if __name__ == "__main__":
    os.umask(0o077)
    main()
