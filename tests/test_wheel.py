"""The wheel, installed elsewhere, is all that a project of one's own needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

SOURCES = ("finetune_assets", "configs", ".dagster_home/dagster.yaml", "workspace.yaml")
SOURCES += ("pyproject.toml", "README.md", "LICENSE")
PARTITIONS = """
import finetune_assets.definitions as d
print(d.__file__)
print(*d.lora_adapter.partitions_def.get_partition_keys())
"""


@pytest.mark.system
@pytest.mark.minutes
def test_a_project_is_created_and_used_from_the_wheel(tmp_path: Path) -> None:
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "a folder"
    for name in SOURCES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    shutil.rmtree(source)
    (wheel,) = tmp_path.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    environment |= {"PYTHONPATH": str(site), "FINETUNE_NAMESPACE": "tests"}

    def python(*arguments: str, cwd: Path = elsewhere) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def finetune(*arguments: str, cwd: Path = elsewhere) -> "subprocess.CompletedProcess[str]":
        return python("-m", "finetune_assets.cli", *arguments, cwd=cwd)

    without = finetune("run", "demo")
    assert without.returncode == 1
    assert "finetune init" in without.stderr
    created = finetune("init", "my project")
    assert created.returncode == 0, created.stderr
    project = elsewhere / "my project"
    files = {path.relative_to(project): path.read_bytes() for path in project.rglob("*") if path.is_file()}
    configs = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert files.keys() == {*configs, Path("workspace.yaml"), Path(".dagster_home/dagster.yaml")}
    assert not any((project / name).is_symlink() for name in files)

    (project / "workspace.yaml").unlink()
    again = finetune("init", "my project")
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert not (project / "workspace.yaml").exists(), "nothing is written"
    shutil.copy(ROOT / "workspace.yaml", project)

    assert finetune("new", "ranks", "--from", "demo-ranks", cwd=project).returncode == 0
    loaded = python("-c", PARTITIONS, cwd=project / "configs")
    path, partitions = loaded.stdout.splitlines()
    assert path.startswith(str(site))
    assert partitions.split() == ["demo", *(f"ranks.rank-{rank}" for rank in (1, 16, 2, 32, 4, 8))]
    ended = finetune("run", "demo", "--select", "cached_base_model", cwd=project / "configs")
    assert ended.returncode == 0, ended.stderr
    assert [*project.glob(".finetune/store/base-models/packaged/demo-base/*/manifest.json")]
    assert (project / ".dagster_home" / "storage").exists() or [*(project / ".dagster_home").glob("*/*.db")]
