"""Loads YAML files and a run's overrides into one validated tree of settings."""

import logging
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune_assets.config.errors import ConfigError, suggest
from finetune_assets.config.raw_data_schema import Columns, RawDataConfig
from finetune_assets.config.schema import ExperimentConfig, StoreConfig, SweepConfig
from finetune_assets.config.sweeps import Point, points, sweep_files
from finetune_assets.config.validation import impossible_raw_settings, impossible_settings, impossible_store_settings

OVERRIDE = "override"
EXPERIMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
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


@dataclass(frozen=True)
class Layer:
    """One source of settings; layers are merged in order."""

    where: str
    tree: DictConfig


def experiment_files(configs: Path) -> list[str]:
    """Sorted names of the experiments that have a file. No file is opened, so an invalid file affects no other.

    Files with a name that cannot be a partition key are skipped with a warning.
    """
    names = []
    for path in sorted((configs / "experiments").iterdir()) if (configs / "experiments").is_dir() else []:
        if path.suffix == ".yaml" and EXPERIMENT_NAME.fullmatch(path.stem) and "..." not in path.stem:
            names.append(path.stem)
        elif path.suffix in (".yaml", ".yml"):
            problem = "use letters, digits, '.', '_' and '-', ending in .yaml"
            logger.warning("Invalid experiment file name %s: %s", path, problem)
    return names


def experiment_names(configs: Path) -> list[str]:
    """Names of all experiments: those with a file, and the points of sweeps.

    An invalid sweep is skipped with an error in the log and affects nothing else.
    """
    names = experiment_files(configs)
    for path in sweep_files(configs):
        try:
            names += [point.name for point in load_sweep(configs, path.stem) if point.name not in names]
        except ConfigError as e:
            logger.error("Skipping sweep %s: %s", path.stem, e)
    return sorted(names)


def load_sweep(configs: Path, name: str) -> list[Point]:
    """Load the points of a sweep.

    Raises:
        ConfigError: naming the file, the setting, and the valid options.
    """
    path = configs / "sweeps" / f"{name}.yaml"
    if not path.is_file() or not EXPERIMENT_NAME.fullmatch(name):
        known = [file.stem for file in sweep_files(configs)]
        raise ConfigError(str(path.parent), "", f"no sweep '{name}' here; {suggest(name, known)}")
    return points(name, _merge(SweepConfig, [_read_layer(path)], path), path)


def load_experiment(configs: Path, name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Merge `base.yaml`, the experiment's file and a run's overrides, and validate the result.

    Args:
        configs: Folder with `base.yaml` and `experiments/`.
        name: Name of the experiment.
        overrides: Dotted settings such as `training.learning_rate=1e-4`.

    Raises:
        ConfigError: naming the file (or the override), the setting, its value, and the valid options.
    """
    point = None if _file_of(configs, name).is_file() else _point(configs, name)
    path = _file_of(configs, point.experiment if point else name)
    if not path.is_file():
        known = experiment_files(configs) if point else experiment_names(configs)
        wanted = point.experiment if point else name
        raise ConfigError(str(path.parent), "", f"no experiment '{wanted}' here; {suggest(wanted, known)}")
    layers = [_read_layer(configs / "base.yaml"), _read_layer(path)]
    layers += [_point_layer(configs, point)] if point else []
    layers += map(_override_layer, overrides)
    config = _merge(ExperimentConfig, layers, path)
    for key, problem in impossible_settings(config):
        raise ConfigError(_who_set(key, layers, path), key, problem)
    for other in config.stack.adapters if config.stack else ():
        if not _file_of(configs, other).is_file() and other not in (known := experiment_names(configs)):
            raise ConfigError(str(path), f"stack.adapters.{other}", f"no such experiment; {suggest(other, known)}")
    if point:
        config.subscribed = False
    return Experiment(name, config, tuple(overrides), point.sweep if point else None)


def _file_of(configs: Path, name: str) -> Path:
    return configs / "experiments" / f"{name}.yaml"


def _point(configs: Path, name: str) -> Point | None:
    """The sweep point with this name, if it exists."""
    for path in sweep_files(configs):
        if name.startswith(f"{path.stem}."):
            match = next((point for point in load_sweep(configs, path.stem) if point.name == name), None)
            if match:
                return match
    return None


def _point_layer(configs: Path, point: Point) -> Layer:
    where = str(configs / "sweeps" / f"{point.sweep}.yaml")
    tree = OmegaConf.create({})
    for setting, value in point.settings.items():
        OmegaConf.update(tree, setting, value, merge=False)
    _refuse_interpolation(OmegaConf.to_container(tree), where)
    return Layer(where, tree)


def load_raw_data_config(configs: Path, source: str | None = None) -> RawDataConfig:
    """Load the deployment's raw data settings; `source`, if given, overrides the file."""
    path = configs / "raw_data.yaml"
    layers = [_read_layer(path)]
    if source:
        layers.append(Layer("FINETUNE_RAW_DATA", OmegaConf.create({"source": source})))
    config = _merge(RawDataConfig, layers, path)
    if source:
        config.sources = {}
    elif config.sources:
        for key in ("source", "columns", "hub"):
            if OmegaConf.select(layers[0].tree, key) is not None:
                raise ConfigError(str(path), key, "cannot be set together with `sources`; set it for each source")
    for key, problem in impossible_raw_settings(config):
        raise ConfigError(_who_set(key, layers, path), key, problem)
    if config.source == "sample":
        config.columns = Columns()  # the packaged rows use the default names; the file's names are for other sources
    return config


def load_store_config(configs: Path) -> StoreConfig:
    """Load the deployment's retention settings of the store."""
    path = configs / "store.yaml"
    layers = [_read_layer(path)] if path.exists() else []
    config = _merge(StoreConfig, layers, path)
    for key, problem in impossible_store_settings(config):
        raise ConfigError(_who_set(key, layers, path), key, problem)
    return config


def base_settings(configs: Path) -> dict[str, Any]:
    """Settings that every experiment starts from: `base.yaml` merged over the defaults; required ones are `???`."""
    base = OmegaConf.merge(_defaults(ExperimentConfig), _read_layer(configs / "base.yaml").tree)
    return OmegaConf.to_container(base)  # type: ignore[return-value]


def load_resolved(path: Path) -> ExperimentConfig:
    """Load a settings tree written by `dump`."""
    return _merge(ExperimentConfig, [_read_layer(path)], path)


def read_settings(text: str) -> dict[str, Any]:
    """Parse a settings tree written by `dump`, without validation, also of another version of this project."""
    return OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[return-value]


def dump(config: ExperimentConfig) -> str:
    """The resolved tree as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_layer(path: Path) -> Layer:
    if not path.is_file():
        raise ConfigError(str(path), "", "file not found; copy it from the project's repository")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(str(path), "", f"not UTF-8 at byte {e.start}; save it as UTF-8") from e
    return _parse(path, text)


@lru_cache(maxsize=64)
def _parse(path: Path, text: str) -> Layer:
    """Cached, because every experiment starts from the same `base.yaml`; layers are never modified."""
    try:
        tree = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except yaml.MarkedYAMLError as e:
        line = f"line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(str(path), line, f"not valid YAML: {e.problem}") from e
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError) as e:
        raise ConfigError(str(path), "", f"expected settings as `name: value`: {_first_line(e)}") from e
    if not isinstance(tree, DictConfig):
        raise ConfigError(str(path), "", "expected settings as `name: value`")
    _refuse_interpolation(OmegaConf.to_container(tree), str(path))
    return Layer(str(path), tree)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _refuse_interpolation(tree: Any, where: str, key: str = "") -> None:
    """Settings must be literal: they are saved with every artifact, so none may come from the environment."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            _refuse_interpolation(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for value in tree:
            _refuse_interpolation(value, where, key)
    elif isinstance(tree, str) and "${" in tree:
        raise ConfigError(where, key, f"{tree!r} must be literal and not hold '${{': it is saved with every artifact")


def _override_layer(override: str) -> Layer:
    key, equals, value = override.partition("=")
    where = f"{OVERRIDE} '{override}'"
    if not equals or not key.strip():
        raise ConfigError(where, "", "expected key=value, such as training.learning_rate=1e-4")
    try:
        tree = OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as e:
        raise ConfigError(where, key, f"{value!r} is not a valid value: {_first_line(e)}") from e
    _refuse_interpolation(OmegaConf.to_container(tree), where)
    return Layer(where, tree)


def _merge(schema: type[T], layers: list[Layer], path: Path) -> T:
    for layer in layers:
        _check_names(schema, OmegaConf.to_container(layer.tree), layer.where)
    try:
        merged = OmegaConf.merge(_defaults(schema), *(layer.tree for layer in layers))  # type: ignore[arg-type]
    except (OmegaConfBaseException, TypeError):
        merged = _merge_one_by_one(schema, layers)
    for key in sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(str(path), key, "must be set: it is '???'")
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as e:
        raise ConfigError(str(path), str(e.full_key or ""), str(e).splitlines()[0]) from e


@lru_cache
def _defaults(schema: type[Any]) -> DictConfig:
    """Cached, because it takes 27 ms, half of the time to load a file."""
    return OmegaConf.structured(schema)


def _merge_one_by_one(schema: type, layers: list[Layer]) -> DictConfig:
    """Merge layer by layer, to find the layer with a type error."""
    merged = _defaults(schema)
    for layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer.tree)  # type: ignore[assignment]
        except OmegaConfBaseException as e:
            raise _type_error(schema, layer, e) from e
        except TypeError as e:
            raise ConfigError(layer.where, "", f"does not fit the settings' structure: {_first_line(e)}") from e
    return merged


def _check_names(schema: type, tree: Any, where: str, path: str = "") -> None:
    """Refuse unknown names, and values in place of groups, before types are checked."""
    if not isinstance(tree, dict):
        raise ConfigError(where, path, f"expected a group of settings, found {tree!r}")
    hints = get_type_hints(schema)
    for name, value in tree.items():
        key = f"{path}.{name}" if path else str(name)
        if name not in hints:
            raise ConfigError(where, key, f"unknown setting (value {value!r}); {suggest(str(name), hints)}")
        group = group_of(hints[name])
        if group and value is not None:
            _check_names(group, value, where, key)


def group_of(hint: Any) -> type | None:
    """The dataclass in a field's type (also in `Wandb | None`), if any."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((option for option in options if is_dataclass(option)), None)  # type: ignore[return-value]


def _type_error(schema: type, layer: Layer, error: OmegaConfBaseException) -> ConfigError:
    key = str(error.full_key or "")
    value = OmegaConf.select(layer.tree, key) if key else OmegaConf.to_container(layer.tree)
    options = _literal_options(schema, key)
    if options:
        return ConfigError(layer.where, key, f"{value!r} is not valid; {suggest(str(value), options)}")
    problem = str(error).splitlines()[0]
    if "is not a ListConfig" in problem:
        problem = "expected a list, such as [one, two]"
    return ConfigError(layer.where, key, f"{value!r} has the wrong type: {problem}")


def _literal_options(schema: type, key: str) -> tuple[str, ...]:
    hint: Any = schema
    for name in key.split("."):
        group = group_of(hint)
        hint = get_type_hints(group).get(name) if group else None
    return get_args(hint) if get_origin(hint) is Literal else ()


def _who_set(key: str, layers: list[Layer], path: Path) -> str:
    setters = (layer.where for layer in reversed(layers) if OmegaConf.select(layer.tree, key) is not None)
    return next(setters, str(path))
