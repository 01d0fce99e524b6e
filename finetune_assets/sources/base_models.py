"""Where a base model comes from: the package, a local folder, or the Hub at a pinned commit."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune_assets.config.errors import suggest
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.errors import UserError
from finetune_assets.sources import hub
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
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class BaseModelError(UserError):
    """A base model that cannot be had, or not be used."""


@dataclass(frozen=True)
class BaseModelSource:
    """One version of a base model.

    Attributes:
        repo: `owner/name` on the Hub; `packaged/...` or `local/...` otherwise.
        revision: The commit; for a folder, a hash of its content.
        folder: Where its files lie on this machine; None for the Hub.
        hashes: sha256 of a folder's files, which its revision stands for; empty for the Hub.
    """

    repo: str
    revision: str
    folder: Path | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """What `model.trust_remote_code` must say to run the code that this version brings."""
        return f"{self.repo}@{self.revision}"


def is_tokenizer_file(path: str) -> bool:
    """Whether the tokenizer is read from this file (config.json may name its class)."""
    return _matches(path, TOKENIZER_FILES)


def is_shape_file(path: str) -> bool:
    """Whether it may say what the model is: its configuration, and code of its own; never weights."""
    return path.endswith((".json", ".py"))


ASK_HUB = partial(hub.commit_of, repo_type="model")


def locate(
    base_model: str, revision: str, root: Path, commit_of: Callable[[str, str], str] = ASK_HUB
) -> BaseModelSource:
    """Pin what `model.base_model` and `model.revision` mean.

    Args:
        base_model: A packaged name, a folder (`./path`, `/path`, `~/path`), or a Hub id.
        revision: Branch, tag or commit on the Hub. A whole commit is not asked for, so that what the store has is used
            with the Hub down.
        root: What a relative folder is relative to.
        commit_of: Says which commit a revision of a repository is.

    Raises:
        BaseModelError: if there is no such model, or the Hub does not answer.
    """
    if base_model in PACKAGED:
        return _pin_folder(f"packaged/{base_model}", PACKAGED[base_model])
    if base_model.startswith((".", "/", "~")):
        folder = (root / Path(base_model).expanduser()).resolve()
        if not folder.is_dir():
            raise BaseModelError(f"model.base_model: folder {folder} does not exist")
        return _pin_folder(f"local/{folder.name}", folder)
    otherwise = f"For a folder write ./{base_model}; for a packaged model: {suggest(base_model, PACKAGED)}"
    with hub.explained(BaseModelError, f"model.base_model: '{base_model}' at '{revision}'", base_model, otherwise):
        return BaseModelSource(base_model, commit_of(base_model, revision))


def collect(source: BaseModelSource, trusted: bool = False) -> dict[str, Path]:
    """Where the files that training needs lie on this machine, by name: safetensors, configuration, tokenizer.

    Args:
        source: The model; one of the Hub is downloaded.
        trusted: Take a model that brings its own code. Without it such a one is refused before its weights are fetched.

    Raises:
        BaseModelError: if files are missing or damaged, the weights are pickled, or the model needs code.
    """
    folder = source.folder or _from_hub(source, trusted)
    names = _wanted(folder, [path.name for path in folder.iterdir()], str(source.folder or source.repo))
    for name in names:
        if name.endswith(".safetensors"):
            _check_weights(folder / name, source.repo)
    if source.folder:
        _check_code(folder, source, trusted)
    return {name: folder / name for name in names}


def _from_hub(source: BaseModelSource, trusted: bool) -> Path:
    """Fetch the small files, decide by them, then fetch the weights; what else the repository holds is left there."""
    where = f"model.base_model: '{source.repo}' at '{source.revision}'"
    with hub.explained(BaseModelError, where, source.repo, "Or name a folder (./...) or a packaged model"):
        found = hub.files_of(source.repo, source.revision, "model")
        files = {name: file for name, file in found.items() if "/" not in name}
        _check_files(files, source.repo)
        small = [file for name, file in files.items() if _matches(name, SMALL_FILES) and not _matches(name, (CODE,))]
        folder = hub.download(source.repo, source.revision, small, "model")
        _check_code(folder, source, trusted)
        wanted = [files[name] for name in _wanted(folder, files, source.repo)]
        return hub.download(source.repo, source.revision, wanted, "model")


def _wanted(folder: Path, names: Collection[str], where: str) -> list[str]:
    """Of the files of a model, those that training reads, sorted; its small files lie in `folder`."""
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
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise BaseModelError(f"{where}: {path.name} is not JSON ({e}); download or save the model again") from e
    if not isinstance(tree, dict):
        raise BaseModelError(f"{where}: {path.name} is not a JSON object; download or save the model again")
    return tree


def _check_weights(path: Path, repo: str) -> None:
    """Read a weights file's header, which says how long the file must be."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as e:
        raise BaseModelError(f"{repo}: {path.name} is damaged ({e}); download or save the model again") from e


def _own_code(config: dict[str, Any]) -> dict[str, str]:
    """The Python classes that a model brings, if transformers has none of its own for it."""
    brought = config.get("auto_map")
    if not isinstance(brought, dict) or not brought:
        return {}
    from transformers import CONFIG_MAPPING

    return {} if config.get("model_type") in CONFIG_MAPPING else brought


def _check_code(folder: Path, source: BaseModelSource, trusted: bool) -> None:
    """Refuse a model that runs its own code, unless this very version of it is trusted, and none of another's."""
    code = _own_code(_read_json(folder / CONFIG, source.repo))
    if not code:
        return
    elsewhere = next((name for name in code.values() if "--" in str(name)), None)
    if elsewhere:
        raise BaseModelError(f"{source.repo}: its code lies in another repository ({elsewhere}), which is refused")
    if not trusted:
        raise BaseModelError(
            f"{source.repo}: needs Python code of its own ({', '.join(sorted(map(str, code.values())))}), which would "
            f"run here. Read it, then set model.trust_remote_code to {source.version}"
        )


def _pin_folder(repo: str, folder: Path) -> BaseModelSource:
    names = [path.name for path in folder.iterdir() if path.is_file()]
    _check_files(names, str(folder))
    content = {name: sha256(folder / name) for name in _wanted(folder, names, str(folder))}
    return BaseModelSource(repo, fingerprint(files=content)[:40], folder, content)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_files(names: Collection[str], where: str) -> None:
    if CONFIG not in names:
        adapter = "an adapter; name the base model that it was trained on" if "adapter_config.json" in names else None
        raise BaseModelError(f"{where}: no config.json, so this is {adapter or 'not a transformers model'}")
    if WEIGHTS not in names and INDEX not in names:
        pickled = next((name for name in sorted(names) if _matches(name, PICKLES)), None)
        other = next((name for name in sorted(names) if name.endswith(".safetensors")), None)
        found = (
            f"only {other}, which transformers does not look for"
            if other
            else f"only pickled weights ({pickled}), which can run code when they are read"
            if pickled
            else "no weights"
        )
        raise BaseModelError(
            f"{where}: {found}; take a revision or repository with {WEIGHTS} or its index, or convert a folder with "
            "transformers' save_pretrained"
        )
    if not any(_matches(name, ("tokenizer.json", "*.model", "vocab.*")) for name in names):
        raise BaseModelError(f"{where}: no tokenizer (tokenizer.json); save it into the same folder")
