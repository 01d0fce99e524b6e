"""Jobs on one machine share its GPUs without ever sharing one."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_assets.errors import UserError
from finetune_assets.worker.gpus import TooFewGPUs, held, visible


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine that shows four GPUs; the folder of its locks, where any user gets to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        program = Path(folder) / "nvidia-smi"
        program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: Some Card (UUID: GPU-$i)"; done\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        yield Path(folder) / "locks"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can play another user")
def test_users_share_them(four: Path) -> None:
    """What one user's job holds, another user's does not get, whoever made the locks."""
    ask = f"""
import os, pathlib
from finetune_assets.worker import gpus
os.setuid(65534)
with gpus.held('2', pathlib.Path({str(four)!r})) as mine:
    print(*mine)
"""
    with held("2", four):
        other = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert other.stdout.split() == ["2", "3"], other.stderr


def test_none_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with held("auto", tmp_path) as gpus:
        assert gpus == []


def test_each_job_gets_its_own(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_GPUS_PER_JOB", "2")
    with held("auto", four) as first, held("auto", four) as second:
        assert (first, second) == (["0", "1"], ["2", "3"])
    with held("auto", four) as again, held("1", four) as one, held(None, four) as evaluation:
        assert (again, one, evaluation) == (["0", "1"], ["2"], ["3"])


def test_all_by_default_and_only_what_is_shown(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held("auto", four) as gpus:
        assert gpus == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert visible() == ["1", "3"]
    with held("auto", four) as gpus:
        assert gpus == ["1", "3"]


def test_too_many_are_refused(four: Path) -> None:
    with pytest.raises(TooFewGPUs, match=r"5.*training\.processes_per_node"), held("5", four):
        pass


def test_waits_until_a_killed_job_lets_go(four: Path) -> None:
    script = (
        "import logging, sys, time; from pathlib import Path; from finetune_assets.worker.gpus import held\n"
        "logging.basicConfig(level='INFO', format='%(levelname)s', stream=sys.stdout)\n"
        "with held('3', Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    job = subprocess.Popen([sys.executable, "-c", script, str(four)], stdout=subprocess.PIPE, text=True)
    assert job.stdout
    assert job.stdout.readline() == "held\n"
    waiting = subprocess.Popen([sys.executable, "-c", script, str(four)], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout
    assert waiting.stdout.readline() == "INFO\n", "it says that it waits"
    with held("1", four) as one:
        assert one == ["3"], "who waits for three holds none meanwhile"
    job.send_signal(signal.SIGKILL)
    assert waiting.stdout.readline() == "held\n"
    waiting.kill()
    waiting.wait()
    job.wait()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can play another user")
@pytest.mark.parametrize("planted", ["lock file", "folder", "missing file"])
def test_a_link_of_another_user_changes_no_mode(four: Path, tmp_path: Path, planted: str) -> None:
    """Mallory replaces a lock, or the folder, by a link to a file of the user who locks it."""
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    if planted != "missing file":
        (secret / "0.lock").write_text("mine")
        (secret / "0.lock").chmod(0o600)
    if planted == "folder":
        four.symlink_to(secret)
    else:
        four.mkdir()
        four.chmod(0o1777)
        (four / "0.lock").symlink_to(secret / "0.lock")
        os.lchown(four / "0.lock", 65534, 65534)
    with pytest.raises(UserError, match=str(four)), held("1", four):
        pass
    assert stat.S_IMODE(secret.stat().st_mode) == 0o700
    if planted == "missing file":
        assert list(secret.iterdir()) == []
    else:
        assert stat.S_IMODE((secret / "0.lock").stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["file", "pipe", "folder as lock"])
def test_what_is_no_lock_is_one_clear_error(four: Path, kind: str) -> None:
    if kind == "file":
        four.write_text("")
    else:
        four.mkdir()
        four.chmod(0o1777)
        (os.mkfifo if kind == "pipe" else os.mkdir)(four / "0.lock")
    with pytest.raises(UserError, match=str(four)), held("1", four):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can play another user")
def test_a_folder_in_which_others_can_replace_locks_is_refused(four: Path) -> None:
    four.mkdir()
    four.chmod(0o777)
    os.chown(four, 65534, 65534)
    with pytest.raises(UserError, match=str(four)), held("1", four):
        pass
    assert stat.S_IMODE(four.stat().st_mode) == 0o777


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_folder_is_sticky_and_locks_are_for_all_users(four: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with held("1", four):
            assert stat.S_IMODE(four.stat().st_mode) == 0o1777
            assert {stat.S_IMODE(lock.stat().st_mode) for lock in four.iterdir()} == {0o666}
    finally:
        os.umask(before)


def test_a_folder_of_an_earlier_version_of_ones_own_is_made_sticky(four: Path) -> None:
    four.mkdir()
    four.chmod(0o777)
    with held("1", four) as gpus:
        assert gpus == ["0"]
    assert stat.S_IMODE(four.stat().st_mode) == 0o1777
