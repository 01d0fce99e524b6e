"""A project of one test's own."""

import atexit
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from paths import ROOT

from finetune_assets.config.examples import copy_example, load_examples
from finetune_assets.store.artifacts import ArtifactStore, open_store

SHORT = ("training.max_steps=2", "evaluation.generated_rows=4", "evaluation.general_tokens=500")
"""Overrides with which an experiment is trained and evaluated in seconds."""


def all_configs(folder: Path) -> Path:
    """Copy the project's configuration into a folder, with each example also as experiment or sweep of its name."""
    return Path(shutil.copytree(_with_examples(), folder / "configs"))


@cache
def _with_examples() -> Path:
    """What `all_configs` copies. Examples are validated when they become experiments: 0.2 s, so once a process."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    configs = Path(shutil.copytree(ROOT / "configs", Path(folder) / "configs"))
    for name in load_examples(configs):
        copy_example(configs, name, name)
    return configs


def share_derived(shared: Path, cache: Path) -> None:
    """Let a new cache have what a machine's experiments share and what depends on code and inputs alone: simulated
    memory, plots, and comparisons of prompts."""
    cache.mkdir(parents=True)
    for name in ("simulations", "derived"):
        (shared / name).mkdir(exist_ok=True)
        (cache / name).symlink_to(shared / name)


@dataclass(frozen=True)
class TestProject:
    """A copy of the project's configuration with a store and a Dagster home of its own."""

    __test__ = False
    root: Path
    namespace: str = "tests"

    @classmethod
    def create(cls, root: Path) -> "TestProject":
        """A new one in a folder, with the configuration of now and all examples."""
        demo = all_configs(root) / "experiments" / "demo.yaml"  # here also trained on rows of a test's own
        demo.write_text(re.sub(r"  sources: .*\n", "", demo.read_text()))
        (root / "dagster_home").mkdir()
        shutil.copy(ROOT / ".dagster_home" / "dagster.yaml", root / "dagster_home")
        return cls(root)

    @property
    def environment(self) -> Mapping[str, str]:
        """What makes a process work on this project."""
        return {
            "FINETUNE_CONFIGS": str(self.configs),
            "FINETUNE_NAMESPACE": self.namespace,
            "DAGSTER_HOME": str(self.root / "dagster_home"),
        }

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    @property
    def cache(self) -> Path:
        return self.root / ".finetune" / "cache"

    @property
    def store(self) -> ArtifactStore:
        return open_store(f"file://{self.root}/.finetune/store", self.namespace, self.cache)

    def published(self, kind: str) -> list[str]:
        """Names of the artifacts of a kind in the store."""
        return sorted(path.parent.name for path in self.store_root.glob(f"{self.namespace}/{kind}/*/manifest.json"))

    @property
    def store_root(self) -> Path:
        return self.root / ".finetune" / "store"

    def leftovers(self) -> list[Path]:
        """Files that belong to no artifact: half-written ones, and those of builds and jobs that ended."""
        whole = {path.parent for path in self.store_root.rglob("manifest.json")}
        stored = [path for path in self.store_root.rglob("*") if path.is_file() and "streams" not in path.parts]
        return [path for path in stored if not whole & {*path.parents}] + self.leftovers_of_builds()

    def leftovers_of_builds(self) -> list[Path]:
        """Folders of builds and jobs that ended."""
        return [path for pattern in ("work/*", "partial/*", "scratch/*") for path in self.cache.glob(pattern)]

    def write_experiment(self, name: str, text: str) -> None:
        (self.configs / "experiments" / f"{name}.yaml").write_text(text, encoding="utf-8")
