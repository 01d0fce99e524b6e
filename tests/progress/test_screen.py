"""Bars in a real terminal: one process draws, nothing is garbled, nothing is left."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
import terminals
from projects import TestProject
from training.conftest import MADE_FROM, configured, dataset

from finetune_assets.config.loading import dump
from finetune_assets.config.schema import Tokenization
from finetune_assets.sources.base_models import PACKAGED

__all__ = ["dataset"]
BAR = "━━"
COUNTING = """
import logging, os, subprocess, sys, time
from finetune_assets import progress
from finetune_assets.progress import ROWS, Progress

progress.EVERY_SECONDS = 0.375
rows = 0
progress.clock = lambda: rows / 8  # each takes an eighth of a second

def count(total=15):
    global rows
    with Progress("counting", total, ROWS) as counted:
        for rows in range(1, 16):
            counted.add(1)
            if rows == 10 and "{seen}" in os.environ:
                while not os.path.exists(os.environ["{seen}"]):
                    time.sleep(0.02)
            if rows == 11:
                subprocess.run(["echo", "said by a child"])
""".replace("{seen}", terminals.SEEN)
"""Counts to 15, and at 10 waits until the terminal has shown it."""
ALONE = """
from finetune_assets.progress import mirror
from finetune_assets.cli.terminal import progress_shown

with mirror.owned(), progress_shown():
    print("before")
    count()
    print("after")
"""
ASSET = """
import dagster as dg
from finetune_assets.assets.materialization import asset_step
from finetune_assets.resources.project import Project

@dg.asset
def counted(context: dg.AssetExecutionContext, project: Project) -> None:
    with asset_step(context):
        count()

defs = dg.Definitions([counted], resources={"project": Project()}, executor=dg.in_process_executor)
"""
TRAINING = """
import os, subprocess, sys
from pathlib import Path
from finetune_assets.progress import mirror
from finetune_assets.progress import Progress
from finetune_assets.progress.relay import heard

with mirror.owned(), heard(Path(sys.argv[1]), Progress.display) as telling:
    sys.exit(subprocess.call(sys.argv[2:], env={**os.environ, **telling}))
"""


def shows_the_bar(seen: terminals.Seen) -> bool:
    return seen.ever("counting", BAR, "10", " rows", "rows/s")


def is_clean(seen: terminals.Seen) -> bool:
    return not any(BAR in line for line in seen.lines) and not seen.screen.cursor.hidden


def test_a_bar_is_drawn_below_what_is_written_and_taken_away() -> None:
    seen = terminals.run("-c", COUNTING + ALONE, shows=shows_the_bar)
    assert seen.code == 0
    assert seen.ever("counting", BAR, "10 of 15 rows", "8.0 rows/s", "ETA 0:00:0")
    assert seen.lines[:2] == ["before", "said by a child"]
    assert all(fact in seen.lines[2] for fact in ("counting", "15 rows", "1.9 s"))
    assert seen.lines[3:] == ["after"], "lines that say no more than the bar are left out"
    assert is_clean(seen)


@pytest.mark.parametrize("columns", [20, 0])
def test_a_terminal_may_be_narrow_or_say_nothing_of_itself(columns: int) -> None:
    shows = lambda seen: seen.ever("10 of 15")  # noqa: E731
    seen = terminals.run("-c", COUNTING + ALONE, columns=columns, lines=columns, shows=shows)
    assert seen.code == 0
    assert "after" in seen.lines
    assert is_clean(seen)


def test_counts_without_a_total_have_no_end() -> None:
    endless = COUNTING + ALONE.replace("count()", "count(None)")
    seen = terminals.run("-c", endless, shows=shows_the_bar, environment={"NO_COLOR": "1"})
    assert seen.code == 0
    assert not seen.ever("ETA")
    assert b"\x1b[3" not in seen.raw, "NO_COLOR"
    assert is_clean(seen)


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    seen = terminals.run("-c", COUNTING + ALONE, shows=shows_the_bar, interrupt=True)
    assert seen.code != 0
    assert "KeyboardInterrupt" in seen.lines[-1], "what is written after the bars is seen too"
    assert is_clean(seen)


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {}])
def test_without_a_terminal_that_can_be_drawn_on_there_are_plain_lines(environment: dict[str, str]) -> None:
    if environment:
        seen = terminals.run("-c", COUNTING + ALONE, environment=environment)
        code, output = seen.code, seen.raw.decode()
    else:
        done = subprocess.run([sys.executable, "-c", COUNTING + ALONE], capture_output=True, text=True)
        code, output = done.returncode, done.stderr
    assert code == 0
    assert len(re.findall(r"counting.* (?:3|6|9|12) of 15 rows.*8\.0 rows/s", output)) == 4
    assert re.search(r"counting.* 15 rows.*8\.0 rows/s", output)
    assert "\x1b" not in output


def test_a_terminal_that_goes_away_fails_nothing(tmp_path: Path) -> None:
    """Its window is closed: writing to it is an error from then on."""
    went = COUNTING + ALONE.replace("count()", "gone(); count()") + f"open({str(tmp_path / 'done')!r}, 'w')"
    closing = "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\ngone = lambda: os.write(0, b'now')\n"
    subprocess.run([sys.executable, "-c", CLOSES, sys.executable, "-c", closing + went], check=True, timeout=300)
    assert (tmp_path / "done").exists()


CLOSES = """
import os, pty, sys
process, terminal = pty.fork()
if process == 0:
    os.execv(sys.argv[1], sys.argv[1:])
seen = b""
while b"now" not in seen:
    seen += os.read(terminal, 1000)
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


@pytest.mark.system
def test_dagsters_lines_and_those_of_children_stand_above_the_bar(project: TestProject, tmp_path: Path) -> None:
    """Although Dagster has its own processes copy them to the terminal."""
    (tmp_path / "counting.py").write_text(COUNTING + ASSET)
    command = ["-m", "dagster", "asset", "materialize", "--select", "counted", "-f", str(tmp_path / "counting.py")]
    seen = terminals.run(*command, columns=250, shows=shows_the_bar)
    assert seen.code == 0
    assert seen.ever("counting", BAR, "10 of 15 rows", "ETA")
    assert "said by a child" in seen.lines, "a line by itself"
    assert sum("counting" in line and "15 rows" in line for line in seen.lines) == 1
    assert not any(" of 15 rows" in line for line in seen.lines), "the bar said it"
    assert is_clean(seen)
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        told = [entry.user_message for entry in instance.all_logs(run.run_id)]
    assert any("counting" in line and "6 of 15 rows" in line for line in told), "the run's page has no bar"


@pytest.mark.soak
@pytest.mark.system
def test_a_training_sends_its_steps_to_the_terminal(dataset: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(configured("training.max_steps=6")))
    (tmp_path / "made_from.json").write_text(json.dumps(MADE_FROM))
    folders = {name: tmp_path / name for name in ("output", "scratch")}
    for folder in folders.values():
        folder.mkdir()
    arguments = {
        "config": tmp_path / "config.yaml",
        "made-from": tmp_path / "made_from.json",
        "base-model": PACKAGED["demo-base"],
        "dataset": dataset(Tokenization()),
        **folders,
    }
    flags = [part for name, path in arguments.items() for part in (f"--{name}", str(path))]
    seen = terminals.run("-c", TRAINING, str(tmp_path), sys.executable, "-m", "finetune_assets.training", *flags)
    assert seen.code == 0
    assert seen.ever("training", BAR, " of 6 steps", "loss", "tokens/s", "ETA")
    assert any("6/6" in line for line in seen.lines)
    assert is_clean(seen)
