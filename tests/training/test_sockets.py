"""While a training runs on one machine, nothing outside the machine can connect to it."""

import json
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT
from processes import AGENT, RANK, family, is_loopback, listening
from tiers import SOAK
from training.conftest import dataset
from training.test_resume import Machine, machine

from finetune_assets.worker import warm
from finetune_assets.worker.process import FORKSERVER, OFF
from finetune_assets.worker.rendezvous import RANKS_FILE, Place, loopback

__all__ = ["dataset", "machine"]
SYSTEM = pytest.mark.system


def test_sockets_of_this_process_are_seen() -> None:
    """What the test below relies on."""
    with socket.socket() as everywhere, socket.socket(socket.AF_INET6) as six, socket.socket() as here:
        udp = socket.socket(type=socket.SOCK_DGRAM)
        for one, address in ((everywhere, "0.0.0.0"), (six, "::"), (here, "127.0.0.1"), (udp, "0.0.0.0")):
            one.bind((address, 0))
            if one is not udp:
                one.listen()
        open_now = {(one.getsockname()[0], one.getsockname()[1]) for one in (everywhere, six, here, udp)}
        assert listening([os.getpid()]) >= open_now
        assert sorted(is_loopback(address) for address, _ in open_now) == [False, False, False, True]
        udp.close()
    assert not listening([os.getpid()]) & open_now
    assert is_loopback("::1")
    assert is_loopback("::ffff:127.0.0.1")


@pytest.mark.parametrize(
    ("ranks", "server"),
    [
        pytest.param(1, None, marks=SOAK),
        pytest.param(2, None, marks=SYSTEM),
        pytest.param(1, OFF, marks=SOAK),
        pytest.param(2, OFF, marks=SOAK),
    ],
    ids=["one forked", "two forked", "one fresh", "two fresh"],
)
def test_training_listens_on_loopback_only(machine: Callable[..., Machine], ranks: int, server: str | None) -> None:
    """Even where the environment names the network's interface, as a cluster's does."""
    one = machine("victim", ranks)
    variables = {"GLOO_SOCKET_IFNAME": "eth9", "NCCL_SOCKET_IFNAME": "eth9", "OMP_NUM_THREADS": "1"}
    process = one.start(**variables, **({FORKSERVER: server} if server else {}))
    seen: set[tuple[str, int]] = set()
    parts, modes = set(), set()
    try:
        while process.poll() is None:
            everyone = family(process.pid)
            seen |= listening(everyone)
            parts |= {member.part for member in everyone.values()}
            folders = (Path(one.spec.cache) / "work").glob("*/rendezvous")
            modes |= {stat.S_IMODE(folder.stat().st_mode) for folder in folders}
            time.sleep(0.02)
    finally:
        process.kill()
        _, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    assert {AGENT, RANK} <= parts, "it was seen while it trained"
    assert [address for address, _ in seen if not is_loopback(address)] == []
    assert modes == {0o700}
    assert ranks == 1 or seen, "the ranks of two connect to each other"


def test_rendezvous_of_one_machine_is_a_file_in_a_private_folder(tmp_path: Path) -> None:
    """Also where a scheduler gives a range of machines an address, and this machine is the only one."""
    for number, (place, nodes) in enumerate([(Place(), (1, 1)), (Place(head="h:1"), (1, 1)), (Place(), (1, 4))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        meeting = place.meeting(nodes, 600, folder)
        assert "--rdzv-conf=store_type=file" in meeting.arguments
        assert "--standalone" not in meeting.arguments
        assert meeting.environment["GLOO_SOCKET_IFNAME"] == meeting.environment["NCCL_SOCKET_IFNAME"] == loopback()
        assert Path(meeting.environment[RANKS_FILE]).parent == folder / "rendezvous"
        assert stat.S_IMODE((folder / "rendezvous").stat().st_mode) == 0o700
    cluster = Place(head="h:1", job="7").meeting((2, 2), 600, tmp_path)
    assert cluster.environment == {}
    assert "--rdzv-endpoint=h:1" in cluster.arguments


COLLECTIVES = """
import json, os, sys
from pathlib import Path
import torch
from torch.distributed import distributed_c10d
from finetune_assets.training import checkpoint
from finetune_assets.training.distributed import joined

def refuse(*_, **__): raise AssertionError("unpickled")
distributed_c10d._unpickler = distributed_c10d._pickler = refuse
folder, weights, state = Path(sys.argv[1]), {}, {}

class Part:
    def state_dict(self): return {"step": 7, "moments": torch.arange(5) / 3}
    def load_state_dict(self, given): state.update(given)

checkpoint.get_peft_model_state_dict = lambda model, **_: {"a": torch.arange(6) / 7}
checkpoint.set_peft_model_state_dict = lambda model, given: weights.update(given)
with joined() as process:
    rank, last = process.rank, process.world - 1
    values = [rank, "", "\u00fc" * rank, {"a": [rank, None, 0.1 + rank, True]}, {}, "x" * (rank * 100_000)]
    said = {"everyones": [process.everyones(value) for value in values],
            "shared": [process.share(value, of=last) for value in values],
            "bytes": [process.share_bytes(content, of=last).hex() for content in (b"", bytes([rank, 0, 255]))]}
    mine = folder / str(rank)
    said["without"] = checkpoint.load_newest(mine, None, {}, process)
    if rank == last:
        best = {"a": torch.arange(6) / 5}
        checkpoint.save(mine, None, {"optimizer": Part()}, {"step": 7, "history": [0.1]}, 2, best)
    restored = checkpoint.load_newest(mine, None, {"optimizer": Part()}, process)
    said["log"], said["best"] = restored.log, restored.best["a"].tolist()
    said["weights"], said["moments"] = weights["a"].tolist(), state["moments"].tolist()
    (folder / f"said-{rank}").write_text(json.dumps(said))
"""


def said(folder: Path, ranks: int) -> list[dict[str, object]]:
    """What the ranks of one machine hear from each other, without pickles."""
    folder.mkdir()
    (folder / "collectives.py").write_text(COLLECTIVES)
    place = {"WORLD_SIZE": str(ranks), RANKS_FILE: str(folder / "ranks"), "GLOO_SOCKET_IFNAME": loopback()}
    environment = {**os.environ, **place, "PYTHONPATH": f"{folder}:{ROOT}"}
    processes = [
        warm.start("collectives", [str(folder)], {**environment, "RANK": str(rank)}, binds=True)
        for rank in range(ranks)
    ]
    assert [process.wait(120) for process in processes] == [0] * ranks
    return [json.loads((folder / f"said-{rank}").read_text()) for rank in range(ranks)]


def test_ranks_exchange_values_and_checkpoints_without_pickles(tmp_path: Path) -> None:
    for ranks in (1, 2):
        last = ranks - 1
        values = [last, "", "\u00fc" * last, {"a": [last, None, 0.1 + last, True]}, {}, "x" * (last * 100_000)]
        heard = said(tmp_path / str(ranks), ranks)
        assert all(one == heard[0] for one in heard)
        assert heard[0]["shared"] == values
        assert [each[-1] for each in heard[0]["everyones"]] == values
        assert {len(each) for each in heard[0]["everyones"]} == {ranks}
        assert heard[0]["bytes"] == ["", bytes([last, 0, 255]).hex()]
        assert heard[0]["without"] is None
        assert heard[0]["log"] == {"step": 7, "history": [0.1]}
        assert heard[0]["best"] == [pytest.approx(number / 5) for number in range(6)]
        assert heard[0]["weights"] == [pytest.approx(number / 7) for number in range(6)]
        assert heard[0]["moments"] == [pytest.approx(number / 3) for number in range(5)]
