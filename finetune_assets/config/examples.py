"""Examples of experiments and sweeps, `configs/examples/`, to be copied. They are not partitions themselves."""

import re
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.config.errors import ConfigError, suggest
from finetune_assets.config.loading import can_be_partition, load_experiment, load_sweep

FOLDER = "examples"
NEEDS = "Needs: "
PLACEHOLDER = "NAME"
"""What the header of an example has in place of the copy's name."""
SWEEP = re.compile(r"^grid:", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        name: Name of its file without `.yaml`.
        text: Content of the file.
    """

    name: str
    text: str

    @property
    def kind(self) -> str:
        """`experiment` or `sweep`."""
        return "sweep" if SWEEP.search(self.text) else "experiment"

    @property
    def description(self) -> str:
        """The header of the file up to what the example needs."""
        return self._header.partition(NEEDS)[0].strip()

    @property
    def needs(self) -> str:
        """What the example needs, from the header."""
        return self._header.partition(NEEDS)[2].strip()

    @property
    def _header(self) -> str:
        """The comment at the beginning of the file, without its commands."""
        lines = []
        for line in self.text.splitlines():
            if not line.startswith("#"):
                break
            if not line.startswith("#   "):
                lines.append(line.removeprefix("#").strip())
        return " ".join(lines)

    def copied(self, name: str) -> str:
        """The content of a copy: its header has the copy's name, and not how to copy the example."""
        lines = (line for line in self.text.splitlines(keepends=True) if not line.startswith("#   finetune new "))
        return re.sub(rf"\b{PLACEHOLDER}\b", lambda _: name, "".join(lines))


def load_examples(configs: Path) -> dict[str, Example]:
    """All examples by name, sorted."""
    paths = sorted((configs / FOLDER).glob("*.yaml"))
    return {path.stem: Example(path.stem, path.read_text(encoding="utf-8")) for path in paths}


def copy_example(configs: Path, example: str, name: str) -> Path:
    """Copy an example into the folder of the experiments or of the sweeps, and load the copy.

    Args:
        configs: Folder of the configuration files.
        example: Name of the example.
        name: Name of the copy.

    Returns:
        The file of the copy.

    Raises:
        ConfigError: if there is no such example, if the name is invalid or taken, or if the copy is invalid, for
            example because `base.yaml` has a setting that contradicts it. Nothing is written then.
    """
    examples = load_examples(configs)
    if example not in examples:
        raise ConfigError(str(configs / FOLDER), "", f"no example '{example}' here; {suggest(example, examples)}")
    if not can_be_partition(name):
        raise ConfigError(f"'{name}'", "", "is not a name; use letters, digits, '.', '_' and '-'")
    chosen = examples[example]
    path = configs / f"{chosen.kind}s" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(chosen.copied(name))
    except FileExistsError as e:
        raise ConfigError(str(path), "", "exists already; choose another name") from e
    try:
        load_sweep(configs, name) if chosen.kind == "sweep" else load_experiment(configs, name)
    except ConfigError:
        path.unlink()
        raise
    return path
