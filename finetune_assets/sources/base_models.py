"""Sources of base models: the package, a local folder or GGUF file, or the Hub at a pinned commit."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open

from finetune_assets.config.errors import suggest
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.errors import UserError
from finetune_assets.sources import hub
from finetune_assets.sources.gguf.convert import VERSION, convert
from finetune_assets.sources.json_files import read_json_object
from finetune_assets.sources.model_sizes import AGAIN, check_sizes
from finetune_assets.store.hashing import sha256

PACKAGED = {"demo-base": Path(__file__).parent.parent / "sample" / "base_model"}
CONFIG, WEIGHTS, INDEX, CODE = "config.json", "model.safetensors", "model.safetensors.index.json", "*.py"
TOKENIZER_FILES = (
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.*",
    CODE,
)
SMALL_FILES = (*TOKENIZER_FILES, "generation_config.json", INDEX)
GGUF = ".gguf"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class BaseModelError(UserError):
    """A base model that cannot be obtained or used."""


@dataclass(frozen=True)
class BaseModelSource:
    """One version of a base model.

    Attributes:
        repo: `owner/name` on the Hub; `packaged/...` or `local/...` otherwise.
        revision: The commit; for a folder, a hash of its content.
        folder: Local folder with its files; None for the Hub.
        hashes: sha256 of a folder's files, from which its revision is computed; empty for the Hub.
        gguf: A GGUF file, which is converted.
    """

    repo: str
    revision: str
    folder: Path | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    gguf: Path | None = None

    @property
    def version(self) -> str:
        """Value of `model.trust_remote_code` that allows this version's own code to run."""
        return f"{self.repo}@{self.revision}"


def is_tokenizer_file(path: str) -> bool:
    """Whether the tokenizer is loaded from this file (config.json may name its class)."""
    return _matches(path, TOKENIZER_FILES)


def is_small_file(path: str) -> bool:
    """Whether training reads this file besides weights and the model's own code, if a repository has it."""
    return _matches(path, SMALL_FILES) and not _matches(path, (CODE,))


def folder_revision(hashes: Mapping[str, str]) -> str:
    """Revision of a folder: a hash of the names and contents of the files that training reads."""
    return fingerprint(files=dict(hashes))[:40]


def is_shape_file(path: str) -> bool:
    """Whether this file can define the model's architecture: configuration and Python code, never weights."""
    return path.endswith((".json", ".py"))


ASK_HUB = partial(hub.commit_of, repo_type="model")


def locate(
    base_model: str, revision: str, root: Path, commit_of: Callable[[str, str], str] = ASK_HUB
) -> BaseModelSource:
    """Resolve `model.base_model` and `model.revision` to a pinned version.

    Args:
        base_model: A packaged name, a folder or GGUF file (`./path`, `/path`, `~/path`), or a Hub id.
        revision: Branch, tag or commit on the Hub. A full commit hash needs no request, so a model in the store can be
            used while the Hub is down.
        root: Folder that relative paths start from.
        commit_of: Returns the commit of a repository's revision.

    Raises:
        BaseModelError: if the model does not exist, or the Hub does not respond.
    """
    if base_model in PACKAGED:
        return _pin_folder(f"packaged/{base_model}", PACKAGED[base_model])
    if base_model.startswith((".", "/", "~")):
        folder = (root / Path(base_model).expanduser()).resolve()
        if folder.suffix == GGUF:
            return _pin_gguf(folder)
        if not folder.is_dir():
            raise BaseModelError(f"model.base_model: folder {folder} does not exist")
        return _pin_folder(f"local/{folder.name}", folder)
    otherwise = f"For a folder write ./{base_model}; for a packaged model: {suggest(base_model, PACKAGED)}"
    with hub.explained(BaseModelError, f"model.base_model: '{base_model}' at '{revision}'", base_model, otherwise):
        return BaseModelSource(base_model, commit_of(base_model, revision))


def collect(
    source: BaseModelSource, trusted: bool = False, workspace: Path | None = None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Local paths of the files that training needs, and their sha256, by name: safetensors, configuration, tokenizer.

    Args:
        source: The model; a model on the Hub is downloaded.
        trusted: Allow a model with its own code. Otherwise it is refused before its weights are downloaded.
        workspace: Empty folder that a GGUF file is converted to.

    Raises:
        BaseModelError: if files are missing or damaged, the weights are pickled, or the model needs code.
    """
    if source.gguf:
        assert workspace is not None
        convert(source.gguf, workspace)
        paths = _collected(source, workspace, trusted)
        return paths, {name: sha256(path) for name, path in paths.items()}
    if source.folder:
        return _collected(source, source.folder, trusted), dict(source.hashes)
    folder, files = _from_hub(source, trusted)
    paths = _collected(source, folder, trusted)
    return paths, {name: files[name].lfs.sha256 if files[name].lfs else sha256(path) for name, path in paths.items()}


def _collected(source: BaseModelSource, folder: Path, trusted: bool) -> dict[str, Path]:
    names = _wanted(folder, [path.name for path in folder.iterdir()], str(source.folder or source.repo))
    for name in names:
        if name.endswith(".safetensors"):
            _check_weights(folder / name, source.repo)
    if source.folder:
        _check_code(folder, source, trusted)
    check_sizes(folder, sum((folder / name).stat().st_size for name in names if name.endswith(".safetensors")))
    return {name: folder / name for name in names}


def _from_hub(source: BaseModelSource, trusted: bool) -> tuple[Path, dict[str, RepoFile]]:
    """Download the small files, check them, then download the weights; other files are not downloaded."""
    where = f"model.base_model: '{source.repo}' at '{source.revision}'"
    with hub.explained(BaseModelError, where, source.repo, "Or name a folder (./...) or a packaged model"):
        tree = hub.files_of(source.repo, source.revision, "model")
        files = {name: file for name, file in tree.items() if "/" not in name}
        _check_files(files, source.repo)
        small = [file for name, file in files.items() if _matches(name, SMALL_FILES) and not _matches(name, (CODE,))]
        folder = hub.download(source.repo, source.revision, small, "model")
        _check_code(folder, source, trusted)
        wanted = [files[name] for name in _wanted(folder, files, source.repo)]
        return hub.download(source.repo, source.revision, wanted, "model"), files


def _wanted(folder: Path, names: Collection[str], where: str) -> list[str]:
    """Sorted names of the model's files that training reads; the small files must be in `folder`."""
    small = {name for name in names if _matches(name, SMALL_FILES)}
    if not _own_code(_read_json(folder / CONFIG, where)):
        small = {name for name in small if not _matches(name, (CODE,))}
    return sorted(small | _weights(folder, names, where))


def _weights(folder: Path, names: Collection[str], where: str) -> set[str]:
    if INDEX not in names:
        return {WEIGHTS}
    shard_of = _read_json(folder / INDEX, where).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise BaseModelError(f"{where}: {INDEX} has no weight_map; download or save the model again")
    shards = set(map(str, shard_of.values()))
    if missing := sorted(shards - set(names)):
        raise BaseModelError(
            f"{where}: {INDEX} names {missing[0]}, which is missing ({len(missing)} of {len(shards)} are); download or "
            "save the model again"
        )
    return shards


def _read_json(path: Path, where: str) -> dict[str, Any]:
    return read_json_object(path, f"{where}: {path.name}", BaseModelError, AGAIN)


def _check_weights(path: Path, repo: str) -> None:
    """Read a weights file's header, which contains the expected file size."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as e:
        raise BaseModelError(f"{repo}: {path.name} is damaged ({e}); download or save the model again") from e


def _own_code(config: dict[str, Any]) -> dict[str, str]:
    """The model's own Python classes, if transformers does not implement its model type."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not auto_map:
        return {}
    from transformers import CONFIG_MAPPING

    return {} if config.get("model_type") in CONFIG_MAPPING else auto_map


def _check_code(folder: Path, source: BaseModelSource, trusted: bool) -> None:
    """Refuse a model with its own code unless this exact version is trusted; code of other repositories always."""
    code = _own_code(_read_json(folder / CONFIG, source.repo))
    if not code:
        return
    elsewhere = next((name for name in code.values() if "--" in str(name)), None)
    if elsewhere:
        raise BaseModelError(
            f"{source.repo}: code from another repository ({elsewhere}) is refused; use a model that includes its code"
        )
    if not trusted:
        raise BaseModelError(
            f"{source.repo}: requires its own Python code ({', '.join(sorted(map(str, code.values())))}), which would "
            f"run on this machine. Read the code, then set model.trust_remote_code to {source.version}"
        )


def _pin_folder(repo: str, folder: Path) -> BaseModelSource:
    names = [path.name for path in folder.iterdir() if path.is_file()]
    _check_files(names, str(folder))
    content = {name: sha256(folder / name) for name in _wanted(folder, names, str(folder))}
    return BaseModelSource(repo, folder_revision(content), folder, content)


def is_gguf(repo: str) -> bool:
    """Whether a model of this name is converted from a GGUF file; its revision is not a hash of the converted files."""
    return repo.startswith("local/") and repo.endswith(GGUF)


def _pin_gguf(path: Path) -> BaseModelSource:
    if path.is_dir():
        return _pin_folder(f"local/{path.stem}", path)
    if not path.is_file():
        raise BaseModelError(f"model.base_model: file {path} does not exist")
    return BaseModelSource(f"local/{path.name}", fingerprint(gguf=sha256(path), converter=VERSION)[:40], gguf=path)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_files(names: Collection[str], where: str) -> None:
    if CONFIG not in names and (gguf := next((name for name in sorted(names) if name.endswith(GGUF)), None)):
        raise BaseModelError(f"{where}: no config.json; name the GGUF file itself: {where}/{gguf}")
    if CONFIG not in names:
        adapter = "an adapter; name the base model that it was trained on" if "adapter_config.json" in names else None
        raise BaseModelError(f"{where}: no config.json, so this is {adapter or 'not a transformers model'}")
    if WEIGHTS not in names and INDEX not in names:
        pickled = next((name for name in sorted(names) if _matches(name, PICKLES)), None)
        other = next((name for name in sorted(names) if name.endswith(".safetensors")), None)
        problem = (
            f"only {other}, a file name that transformers does not load"
            if other
            else f"only pickled weights ({pickled}), which can run code when they are loaded"
            if pickled
            else "no weights"
        )
        raise BaseModelError(
            f"{where}: {problem}; use a revision or repository with {WEIGHTS} or its index, or convert a folder with "
            "transformers' save_pretrained"
        )
    if not any(_matches(name, ("tokenizer.json", "*.model", "vocab.*")) for name in names):
        raise BaseModelError(f"{where}: no tokenizer (tokenizer.json); save it into the same folder")
