"""Loads YAML files and a run's overrides into one validated tree of settings."""

import logging
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune_assets.config.errors import MOST_SHOWN, ConfigError, names_secret, suggest
from finetune_assets.config.overrides import read_override
from finetune_assets.config.raw_data_schema import PACKAGED_ROWS, Columns, RawDataConfig
from finetune_assets.config.raw_validation import impossible_raw_settings
from finetune_assets.config.schema import ExperimentConfig, StoreConfig, SweepConfig
from finetune_assets.config.sweeps import GridReader, Point, points, settings_tree, sweep_files
from finetune_assets.config.typed_yaml import MOST_CHARACTERS, TOO_DEEP, TypedReader, read_document
from finetune_assets.config.validation import impossible_settings, impossible_store_settings

OVERRIDE, ENVIRONMENT = "override", "launcher.environment"
EXPERIMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NAMES = "use letters, digits, '.', '_' and '-', ending in .yaml"
CACHED = 1_024
"""Number of files, and of experiments, whose settings are kept in memory, about 50 KB each."""
logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Experiment:
    """Resolved settings of one experiment.

    Attributes:
        name: Partition key: name of the experiment's file without `.yaml`, or of the sweep point.
        config: Complete and validated settings.
        overrides: Dotted `key=value` strings of this run; an adapter trained with overrides is never promoted.
        sweep: Name of the sweep, if the experiment is a point of one.
    """

    name: str
    config: ExperimentConfig
    overrides: tuple[str, ...] = ()
    sweep: str | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """One source of settings; layers are merged in order. Equal only to itself, so that merging is cached.

    Attributes:
        where: The file or override.
        tree: Its settings as plain data.
        settings: The same for OmegaConf.
    """

    where: str
    tree: dict[str, Any]
    settings: DictConfig


def experiment_files(configs: Path) -> list[str]:
    """Sorted names of the experiments that have a file. No file is opened, so an invalid file affects no other.

    Files with a name that cannot be a partition key are skipped with a warning. So that artifacts of two experiments
    never share a folder on a disk that ignores case, a warning names files that differ only by case.
    """
    names = _names_in(configs / "experiments", "experiment")
    by_case = {name.lower(): name for name in names}
    for name in names:
        if (other := by_case[name.lower()]) != name:
            logger.warning("Experiments %s and %s differ only by case; rename one, because disks may not", name, other)
    return names


def document_sets(configs: Path) -> list[str]:
    """Sorted names of the document sets. No file is opened, so an invalid file affects no other set."""
    return _names_in(configs / "documents", "document set")


def _names_in(folder: Path, what: str) -> list[str]:
    """Sorted names of a folder's YAML files; names that cannot be partition keys are skipped with a warning."""
    names = []
    for path in _files_in(folder):
        if path.suffix == ".yaml" and can_be_partition(path.stem):
            names.append(path.stem)
        elif path.suffix in (".yaml", ".yml"):
            logger.warning("Invalid %s file name %s: %s", what, path, NAMES)
    return sorted(names)


def can_be_partition(name: str) -> bool:
    """Whether an experiment or a sweep can have this name."""
    return bool(EXPERIMENT_NAME.fullmatch(name)) and "..." not in name


def _files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _has_file(configs: Path, name: str) -> bool:
    path = _file_of(configs, name)
    return can_be_partition(name) and path in _files_in(path.parent)


def experiment_names(configs: Path) -> list[str]:
    """Names of all experiments: those with a file, and the points of sweeps.

    An invalid sweep is skipped with an error in the log and affects nothing else.
    """
    names = experiment_files(configs)
    for path in _files_in(configs / "sweeps"):
        if path.suffix == ".yml":
            logger.warning("Invalid sweep file name %s: %s", path, NAMES)
    for path in sweep_files(configs):
        try:
            found = {point.name for point in load_sweep(configs, path.stem)}
            for name in sorted(found & {*names}):
                logger.error("Skipping point %s of sweep %s: an experiment has this name", name, path.stem)
            names += found - {*names}
        except ConfigError as e:
            logger.error("Skipping sweep %s: %s", path.stem, e)
    return sorted(names)


def load_sweep(configs: Path, name: str) -> list[Point]:
    """Load the points of a sweep.

    Raises:
        ConfigError: naming the file, the setting, and the valid options.
    """
    path = configs / "sweeps" / f"{name}.yaml"
    if path not in sweep_files(configs):
        known = [file.stem for file in sweep_files(configs)]
        raise ConfigError(str(path.parent), "", f"no sweep '{name}' here; {suggest(name, known)}")
    if not can_be_partition(name):
        raise ConfigError(str(path), "", f"invalid file name: {NAMES}")
    config = _merge(SweepConfig, [_read_layer(path, SweepConfig, GridReader)], path)
    if not _has_file(configs, config.experiment):
        problem = f"no experiment '{config.experiment}'; {suggest(config.experiment, experiment_files(configs))}"
        raise ConfigError(str(path), "experiment", problem)
    return points(name, config, path)


def load_experiment(configs: Path, name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Merge `base.yaml`, the experiment's file and a run's overrides, and validate the result.

    Args:
        configs: Folder with `base.yaml` and `experiments/`.
        name: Name of the experiment.
        overrides: Dotted settings such as `training.learning_rate=1e-4`.

    Raises:
        ConfigError: naming the file (or the override), the setting, its value, and the valid options.
    """
    has_file = _has_file(configs, name)
    point = None if has_file else _point(configs, name)
    if not point and not has_file:
        known = experiment_names(configs)
        hint = suggest(name, known) if known else "`finetune init FOLDER` creates a project"
        raise ConfigError(str(configs / "experiments"), "", f"no experiment '{name}' here; {hint}")
    path = _file_of(configs, point.experiment if point else name)
    layers = [_read_layer(file, ExperimentConfig) for file in (configs / "base.yaml", path)]
    layers += [_point_layer(configs, point)] if point else []
    layers += map(_override_layer, overrides)
    config = _merge(ExperimentConfig, layers, path)
    for key, problem in impossible_settings(config):
        raise ConfigError(_who_set(key, layers, path), key, problem)
    for other in config.stack.adapters if config.stack else ():
        if not _has_file(configs, other) and other not in (known := experiment_names(configs)):
            raise ConfigError(str(path), f"stack.adapters.{other}", f"no such experiment; {suggest(other, known)}")
    if config.data.retrieval and (chosen := config.data.retrieval.documents) not in (sets := document_sets(configs)):
        key = "data.retrieval.documents"
        hint = suggest(chosen, sets) if sets else f"add {configs / 'documents' / 'NAME.yaml'}"
        raise ConfigError(_who_set(key, layers, path), key, f"no document set '{chosen}'; {hint}")
    if point:
        config.subscribed = False
    return Experiment(name, config, tuple(overrides), point.sweep if point else None)


def _file_of(configs: Path, name: str) -> Path:
    return configs / "experiments" / f"{name}.yaml"


def _point(configs: Path, name: str) -> Point | None:
    """The sweep point with this name, if it exists.

    Raises:
        ConfigError: if no sweep has it, and a sweep that may define it cannot be read.
    """
    problem = None
    for path in sweep_files(configs):
        if name.startswith(f"{path.stem}."):
            try:
                match = next((point for point in load_sweep(configs, path.stem) if point.name == name), None)
            except ConfigError as e:
                problem = problem or e
                continue
            if match:
                return match
    if problem:
        raise problem
    return None


def _point_layer(configs: Path, point: Point) -> Layer:
    where = str(configs / "sweeps" / f"{point.sweep}.yaml")
    return _layer(where, settings_tree(point.settings, where))


def load_raw_data_config(configs: Path, source: str | None = None) -> RawDataConfig:
    """Load the deployment's raw data settings; `source`, if given, overrides the file."""
    path = configs / "raw_data.yaml"
    layers = [_read_layer(path, RawDataConfig)]
    if source:
        where = "FINETUNE_RAW_DATA"
        layers.append(_layer(where, {"source": TypedReader(where).literal(source, "source")}))
    config = _merge(RawDataConfig, layers, path)
    if source:
        config.sources = {}
    elif config.sources:
        for key in ("source", "columns", "hub"):
            if layers[0].tree.get(key) not in (None, {}):
                raise ConfigError(str(path), key, "cannot be set together with `sources`; set it for each source")
    for key, problem in impossible_raw_settings(config):
        raise ConfigError(_who_set(key, layers, path), key, problem)
    if config.source in PACKAGED_ROWS:
        config.columns = Columns()  # the packaged rows use the default names; the file's names are for other sources
    return config


def load_store_config(configs: Path) -> StoreConfig:
    """Load the deployment's retention settings of the store."""
    path = configs / "store.yaml"
    if (other := path.with_suffix(".yml")).exists():
        raise ConfigError(str(other), "", "would be ignored; rename it to store.yaml")
    layers = [_read_layer(path, StoreConfig)] if path.exists() else []
    config = _merge(StoreConfig, layers, path)
    for key, problem in impossible_store_settings(config):
        raise ConfigError(_who_set(key, layers, path), key, problem)
    return config


def load_file(schema: type[T], path: Path) -> T:
    """Load the settings of one file over the defaults of its schema, without rules between settings.

    Raises:
        ConfigError: naming the file, the setting, its value, and the valid options.
    """
    return _merge(schema, [_read_layer(path, schema)], path)


def base_settings(configs: Path) -> dict[str, Any]:
    """Settings that every experiment starts from: `base.yaml` merged over the defaults; required ones are `???`."""
    base = OmegaConf.merge(_defaults(ExperimentConfig), _read_layer(configs / "base.yaml", ExperimentConfig).settings)
    return OmegaConf.to_container(base)  # type: ignore[return-value]


def load_resolved(path: Path) -> ExperimentConfig:
    """Load a settings tree written by `dump`."""
    return _merge(ExperimentConfig, [_read_layer(path, ExperimentConfig)], path)


def read_settings(text: str) -> dict[str, Any]:
    """Parse a settings tree written by `dump`, without validation, also of another version of this project."""
    try:
        return OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[return-value]
    except RecursionError as e:
        raise ConfigError("config.yaml", "", TOO_DEEP) from e


def dump(config: ExperimentConfig) -> str:
    """The resolved tree as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_layer(path: Path, schema: type, reader: type[TypedReader] | None = None) -> Layer:
    try:
        if not path.exists():
            raise ConfigError(str(path), "", "file not found; `finetune init FOLDER` creates the files of a project")
        if not path.is_file():
            raise ConfigError(str(path), "", "not a file; settings are read from YAML files")
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as e:
        raise ConfigError(str(path), "", f"not UTF-8 at byte {e.start}; save it as UTF-8") from e
    except OSError as e:
        raise ConfigError(str(path), "", f"cannot be read: {e.strerror}") from e
    return _parse(schema, path, text, reader)  # type: ignore[arg-type]


@lru_cache(maxsize=CACHED)
def _parse(schema: type, path: Path, text: str, reader: type[TypedReader] | None) -> Layer:
    """Cached, because every experiment starts from the same `base.yaml`; layers are never modified."""
    return _layer(str(path), read_document(schema, text, str(path), reader))


def _layer(where: str, tree: dict[str, Any]) -> Layer:
    return Layer(where, tree, OmegaConf.create(tree))


def _override_layer(override: str) -> Layer:
    setting = override.partition("=")[0]
    given = f"{setting}=..." if names_secret(override) or setting.startswith(ENVIRONMENT) else override
    where = f"{OVERRIDE} '{given if len(given) <= MOST_SHOWN else f'{given[:MOST_SHOWN]}...'}'"
    return _layer(where, read_override(ExperimentConfig, override, where))


def _merge(schema: type[T], layers: list[Layer], path: Path) -> T:
    return deepcopy(_merged(schema, tuple(layers), path))  # type: ignore[arg-type]


@lru_cache(maxsize=CACHED)
def _merged(schema: type[Any], layers: tuple[Layer, ...], path: Path) -> Any:
    """Cached, because it takes 20 ms, and the daemon loads every experiment again and again."""
    try:
        merged = OmegaConf.merge(_defaults(schema), *(layer.settings for layer in layers))  # type: ignore[arg-type]
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(str(path), key, "must be set: it is '???'")
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as e:
        raise ConfigError(str(path), str(e.full_key or ""), str(e).partition("\n")[0]) from e


@lru_cache
def _defaults(schema: type[Any]) -> DictConfig:
    """Cached, because it takes 27 ms, half of the time to load a file."""
    return OmegaConf.structured(schema)


def _who_set(key: str, layers: list[Layer], path: Path) -> str:
    setters = (layer.where for layer in reversed(layers) if _sets(layer.tree, key))
    return next(setters, str(path))


def _sets(tree: Any, key: str) -> bool:
    """Whether a tree has a value at a dotted key; names in the tree may contain dots."""
    if key == "":
        return tree is not None
    names = [name for name in tree if key == name or key.startswith(f"{name}.")] if isinstance(tree, dict) else []
    return any(_sets(tree[name], key[len(name) + 1 :]) for name in names)
