"""Processes of this machine, as `ps` shows them."""

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SERVER, JOB = "finetune_assets/worker/forkserver.py", "finetune_assets.worker.bootstrap"
AGENT, RANK = "finetune_assets.worker.torchrun", "-m finetune_assets.training"
"""What the command lines of the parts of a training have."""


@dataclass(frozen=True)
class Process:
    """A process that runs.

    Attributes:
        pid: Its number.
        parent: Its parent's.
        command: Its command line.
        environment: The environment that it began with; that of a forked process is its parent's.
    """

    pid: int
    parent: int
    command: str
    environment: str

    @property
    def part(self) -> str:
        """Which part of a training it is; empty if none."""
        return next((words for words in (SERVER, JOB, AGENT, RANK) if words in self.command), "")


def running() -> dict[int, Process]:
    """All processes that have not ended, by number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            texts = [(folder / name).read_bytes().replace(b"\0", b" ") for name in ("cmdline", "environ")]
        except OSError:
            continue
        if state != "Z":
            pid = int(folder.name)
            found[pid] = Process(pid, int(parent), *(text.decode(errors="replace") for text in texts))
    return found


def runs(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pids: Iterable[int]) -> None:
    """Kill -9 of several; those that the end of another has ended meanwhile are no error."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def family(root: int) -> dict[int, Process]:
    """A process and all that come of it."""
    there = running()
    members: Set[int] = {root}
    while more := {one.pid for one in there.values() if one.parent in members} - members:
        members |= more
    return {pid: there[pid] for pid in members & there.keys()}


def of_project(root: Path, *words: str) -> list[Process]:
    """Processes whose command line has one of `words`; it names the project, or the environment of an ancestor does."""
    there = running()

    def belongs(one: Process | None) -> bool:
        if one is None:
            return False
        return any(str(root) in text for text in (one.command, one.environment)) or belongs(there.get(one.parent))

    return [one for one in there.values() if any(word in one.command for word in words) and belongs(one)]


TCP_LISTENS, UDP_BOUND = "0A", "07"
"""States in /proc/net."""


def listening(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Addresses and ports at which processes take connections or datagrams, from their own network's tables."""
    found = set()
    for pid in pids:
        try:
            files = [_target(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
            tables = {name: Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6", "udp", "udp6")}
        except OSError:  # it has ended
            continue
        sockets = {file[len("socket:[") : -1] for file in files if file.startswith("socket:[")}
        for name, table in tables.items():
            waits = TCP_LISTENS if name.startswith("tcp") else UDP_BOUND
            for fields in map(str.split, table.splitlines()[1:]):
                if fields[3] == waits and fields[9] in sockets:
                    address, _, port = fields[1].partition(":")
                    found.add((_address(address), int(port, 16)))
    return found


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # it was closed
        return ""


def _address(words: str) -> str:
    """An address as /proc/net shows it: 32-bit words in the byte order of the machine."""
    raw = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    return str(ipaddress.ip_address(socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)))


def is_loopback(address: str) -> bool:
    one = ipaddress.ip_address(address)
    mapped = one.ipv4_mapped if isinstance(one, ipaddress.IPv6Address) else None
    return (mapped or one).is_loopback
