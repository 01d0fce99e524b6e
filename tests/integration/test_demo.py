"""`make demo` as a newcomer meets it, twice."""

import re
import subprocess
import sys

from projects import TestProject


def demo() -> str:
    run = subprocess.run([sys.executable, "-m", "finetune_assets.demo"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_demo_learns_to_answer_and_trains_nothing_twice(project: TestProject) -> None:
    first = demo()
    before, after = re.search(r"exact match\W+(\d+)%\W+(\d+)%", first).groups()  # type: ignore[union-attr]
    assert int(before) <= 5
    assert int(after) >= 70
    loss = re.search(r"held-out loss\W+([\d.]+)\W+([\d.]+)", first)
    assert loss
    assert float(loss[2]) < float(loss[1])
    assert first.count("├") == 4, "five answers side by side"
    assert "Nothing was trained again" not in first
    assert "The adapter lies in" in first
    assert "make ui" in first
    (name,) = project.published("adapters")
    assert name in first.replace("\n", "")

    second = demo()
    assert "Nothing was trained again" in second
    assert project.published("adapters") == [name]
