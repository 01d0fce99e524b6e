"""A real Slurm for tests: a controller and nodes on one machine, each node in network and host name of its own.

Debian: `apt-get install slurm-wlm munge iproute2`; runs as root. The nodes' only network is a bridge to this machine,
on which nothing else is.
"""

import os
import random
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from processes import kill

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "ip", "unshare", "nsenter")
NETWORK = "10.213.{}"
"""Of one cluster; the controller is its `.0.1`."""
START_SECONDS = 120
CLEAR_SECONDS = 180

CONF = """
ClusterName=tests
SlurmctldHost=controller({controller})
SlurmctldParameters=enable_configless
SlurmctldPort={port}
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=8
SlurmctldTimeout=30
InactiveLimit=0
KillWait=20
MinJobAge=60
OverTimeLimit=0
MaxJobCount={jobs}
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
PartitionName=main Nodes=ALL Default=YES MaxTime=02:00:00 PriorityTier=1 GraceTime=30 State=UP
PartitionName=short Nodes=ALL MaxTime=00:10:00 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=00:10:00 PriorityTier=9 State=UP
"""


@dataclass
class Node:
    """One machine of the cluster.

    Attributes:
        name: Its host name.
        address: Where the others reach it.
        process: Its slurmd, in namespaces of its own; everything it starts is below it.
    """

    name: str
    address: str
    process: "subprocess.Popen[bytes] | None" = None


@dataclass
class Slurm:
    """A running cluster.

    Attributes:
        folder: Its configuration and logs.
        controller: The address at which the nodes reach this machine.
        nodes: Its machines.
    """

    folder: Path
    name: str
    controller: str
    nodes: list[Node]
    processes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands ask this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def jobs(self) -> list[str]:
        """Numbers of the jobs that wait or run."""
        return self.run("squeue", "-h", "-o", "%i").split()

    def clear(self) -> None:
        """End all jobs, and wait until nothing of them is left."""
        deadline = time.monotonic() + CLEAR_SECONDS
        while jobs := self.jobs():
            if time.monotonic() > deadline:
                raise RuntimeError(f"Slurm's jobs {', '.join(jobs)} do not end; see {self.folder}")
            subprocess.run(["scancel", *jobs], env=os.environ | self.environment, capture_output=True)
            time.sleep(0.5)

    def ready(self) -> bool:
        """Whether all machines wait for a job."""
        return _idle(self) == len(self.nodes)

    def has_lost(self, node: Node) -> bool:
        """Whether the controller has noticed that a machine is gone."""
        return self.run("sinfo", "-h", "-N", "-n", node.name, "-p", "main", "-o", "%T").startswith("down")

    def limit(self, job: str, minutes: int) -> None:
        """Change how long a job may run."""
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def kill(self, node: Node) -> None:
        """All of a machine at once, as where the power fails."""
        assert node.process
        kill(self.processes_of(node))
        node.process.kill()
        node.process.wait()
        node.process = None

    def processes_of(self, node: Node) -> list[int]:
        """Everything that runs on a machine."""
        listed = subprocess.run(["ip", "netns", "pids", f"{self.name}-{node.name}"], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def boot(self, node: Node, again: bool = False) -> None:
        """Start a machine's slurmd; `again` has it say that the machine was started anew."""
        flags = "-D -b" if again else "-D"
        inner = f"hostname {node.name} && exec slurmd {flags} -N {node.name} -f {self.folder}/slurm.conf"
        command = ["ip", "netns", "exec", f"{self.name}-{node.name}", "unshare", "--uts", "sh", "-c", inner]
        with open(self.folder / f"{node.name}.out", "ab") as out:
            node.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | self.environment, start_new_session=True
            )


def missing() -> str | None:
    """What is not there, or None."""
    if os.getuid() != 0:
        return "root, for network namespaces"
    return next((name for name in PROGRAMS if not shutil.which(name)), None)


@contextmanager
def running(folder: Path, nodes: int = 2, jobs: int = 100) -> Iterator[Slurm]:
    """A cluster until the context ends.

    Args:
        folder: Empty.
        nodes: How many machines it has.
        jobs: How many jobs it takes.
    """
    short, network = uuid.uuid4().hex[:6], _free_network()
    machines = [Node(f"n{i + 1}", f"{network}.{i + 2}") for i in range(nodes)]
    cluster = Slurm(folder, f"s{short}", f"{network}.1", machines)
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    lines = [f"NodeName={node.name} NodeAddr={node.address} CPUs=2 State=UNKNOWN" for node in machines]
    (folder / "slurm.conf").write_text(
        CONF.format(folder=folder, controller=cluster.controller, port=_free_port(), jobs=jobs, nodes="\n".join(lines))
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    try:
        _connect(cluster)
        _start(cluster)
        yield cluster
    finally:
        _end(cluster)


def _free_network() -> str:
    """One that no other cluster of this machine has."""
    taken = subprocess.run(["ip", "-o", "-4", "address"], capture_output=True, text=True).stdout
    networks = [NETWORK.format(number) for number in random.sample(range(250), 250)]
    return next(network for network in networks if f" {network}.1/" not in taken)


def _free_port() -> int:
    """Of this machine, on which another test's controller may run."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _start(cluster: Slurm) -> None:
    folder = cluster.folder
    key = folder / "munge.key"
    _run("mungekey", "--create", f"--keyfile={key}")
    files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    flags = [f"--{name}={folder}/munge.{ending}" for name, ending in files.items()]
    _daemon(cluster, "munged", "--foreground", "--force", f"--key-file={key}", *flags)
    _wait(cluster, lambda: (folder / "munge.socket").exists())
    _daemon(
        cluster, "unshare", "--uts", "sh", "-c", f"hostname controller && exec slurmctld -D -i -f {folder}/slurm.conf"
    )
    for node in cluster.nodes:
        cluster.boot(node)
    _wait(cluster, cluster.ready)


def _idle(cluster: Slurm) -> int:
    try:
        return cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split().count("idle")
    except subprocess.CalledProcessError:
        return 0


def _wait(cluster: Slurm, ready: "object") -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm did not start; see {cluster.folder}")
        time.sleep(0.1)


def _connect(cluster: Slurm) -> None:
    """A bridge, and a cable from it to each machine."""
    bridge = f"{cluster.name}-br"
    _run("ip", "link", "add", bridge, "type", "bridge")
    _run("ip", "addr", "add", f"{cluster.controller}/24", "dev", bridge)
    _run("ip", "link", "set", bridge, "up")
    hosts = "".join(f"{node.address} {node.name}\n" for node in cluster.nodes)
    for node in cluster.nodes:
        space, cable = f"{cluster.name}-{node.name}", f"{cluster.name}{node.name}"
        etc = Path("/etc/netns") / space
        etc.mkdir(parents=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{cluster.controller} controller\n{hosts}")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "resolv.conf").write_text("")
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", cable, "master", bridge, "up")
        _run("ip", "-n", space, "addr", "add", f"{node.address}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")


def _end(cluster: Slurm) -> None:
    for node in cluster.nodes:
        if node.process:
            cluster.kill(node)
    for process in reversed(cluster.processes):
        process.kill()
        process.wait()
    for node in cluster.nodes:
        space = f"{cluster.name}-{node.name}"
        subprocess.run(["ip", "netns", "del", space], capture_output=True)
        shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
    subprocess.run(["ip", "link", "del", f"{cluster.name}-br"], capture_output=True)


def _daemon(cluster: Slurm, *command: str) -> None:
    with open(cluster.folder / f"{command[0]}-{len(cluster.processes)}.out", "wb") as out:
        environment = os.environ | cluster.environment
        cluster.processes.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
