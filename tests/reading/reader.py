"""A reader who types what a page shows into one terminal, in a project of their own."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from paths import ROOT
from reading.blocks import Block, blocks

from finetune_assets.config import documents, loading

SECONDS = 900
COPIED = ("configs", "Makefile", "pyproject.toml", "requirements", "workspace.yaml")
LOADERS = {
    "experiments": lambda file: loading.load_experiment(file.parents[1], file.stem),
    "documents": lambda file: documents.load_documents(file.parents[1], file.stem),
    "sweeps": lambda file: loading.load_sweep(file.parents[1], file.stem),
    "raw_data": lambda file: loading.load_raw_data_config(file.parent),
    "store": lambda file: loading.load_store_config(file.parent),
    "base": lambda file: loading.load_experiment(file.parent, "demo"),
}


@dataclass
class Reader:
    """One page's reader.

    Attributes:
        root: The project.
        environment: Added to this process's.
        said: What each command printed.
    """

    root: Path
    environment: dict[str, str]
    said: list[str] = field(default_factory=list)

    def follow(self, page: Path) -> None:
        """Do what a page says, from its first block to its last."""
        for block in blocks(page):
            self.do(block)

    def do(self, block: Block) -> None:
        """Do what one block says."""
        if block.file:
            self._write(self.root / block.file, block.text)
        elif block.language == "diff":
            self._patch(block)
        elif block.mark == "run":
            self._run(block)
        elif block.mark == "output":
            self._compare(block)

    def _write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        if file.suffix == ".yaml":
            LOADERS[file.parent.name if file.parent.name != "configs" else file.stem](file)

    def _patch(self, block: Block) -> None:
        """Apply a diff, whose lines are found by what stands there and not by their numbers."""
        patched = subprocess.run(
            ["git", "apply", "--recount", "--unidiff-zero", "-"],
            cwd=self.root,
            input=block.text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert patched.returncode == 0, f"{block.where}: {patched.stderr}"

    def _run(self, block: Block) -> None:
        """In the folder and with the exported variables that the block before left."""
        terminal = self.root / ".terminal"
        keep = f'trap \'{{ export -p; printf "cd %q\\n" "$PWD"; }} > "{terminal}"\' EXIT\nset -e\n'
        script = f"[ ! -e '{terminal}' ] || . '{terminal}'\n{keep}"
        script += block.text if block.language == "sh" else f"python - <<'PYTHON'\n{block.text}PYTHON\n"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.root,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        self.said.append(done.stdout)
        assert done.returncode == block.exit_code, f"{block.where}: exit code {done.returncode}\n{done.stdout[-4000:]}"

    def _compare(self, block: Block) -> None:
        said = _plain(self.said[-1])
        for line in filter(None, map(_plain, block.text.splitlines())):
            pattern = ".*".join(re.escape(part) for part in line.split("..."))
            assert re.search(pattern, said), f"{block.where}: not said: {line}\n{said[-4000:]}"


def _plain(text: str) -> str:
    """Without the lines of tables and with single spaces, so that no width of a terminal matters; line breaks stay."""
    return "\n".join(" ".join(re.sub(r"[│┃|━─┏┓┡┩└┘├┤┬┴┼╇┳]", " ", line).split()) for line in text.splitlines())


def new_project(root: Path) -> Reader:
    """A fresh copy of the project as a clone with `make` done has it, offline."""
    root.mkdir(parents=True)
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    home = root / ".dagster_home"
    home.mkdir()
    shutil.copy(ROOT / ".dagster_home" / "dagster.yaml", home)
    environment = root / ".venv"
    environment.mkdir()
    for part in Path(sys.prefix).iterdir():
        (environment / part.name).symlink_to(part)
    (environment / "installed").unlink(missing_ok=True)
    (environment / "installed").touch()
    variables = {
        "FINETUNE_CONFIGS": str(root / "configs"),
        "DAGSTER_HOME": str(home),
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "COLUMNS": "160",
    }
    return Reader(root, variables)


def copy_code(reader: Reader) -> None:
    """Give a project the code too, as a clone has it, to be changed by its reader."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "finetune_assets", reader.root / "finetune_assets", ignore=ignored)
    shutil.copy(ROOT / "setup.cfg", reader.root)
    reader.environment["PYTHONPATH"] = str(reader.root)
