"""Compares base models in the store, which all namespaces share, with what is known of them.

Another namespace, or somebody who may write only to the shared base models, may have published other files under a
model's name. The revision of a folder is a hash of its files. For a commit on the Hub, the hashes of its files are
recorded in this namespace at the first use; for a GGUF file, when this namespace converts it.
"""

import hashlib
import logging

from huggingface_hub.errors import HTTPError

from finetune_assets.artifacts.kinds import BASE_MODELS
from finetune_assets.artifacts.layout import NOT_ON_THE_HUB
from finetune_assets.sources import hub
from finetune_assets.sources.base_models import BaseModelError, folder_revision, is_gguf, is_small_file
from finetune_assets.sources.pins import Pins
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import ForeignContent
from finetune_assets.store.manifest import Manifest, check_files

logger = logging.getLogger(__name__)


def find_base_model(pins: Pins, name: str, trusted: str | None = None) -> ArtifactRef | None:
    """Return the base model with this name, or None.

    Args:
        pins: Records of this namespace.
        name: `<repo>/<revision>`.
        trusted: Version whose own code may run, as `model.trust_remote_code` names it.

    Raises:
        ForeignContent: If its files are not those of this revision.
        BaseModelError: If its own code may run, and its files cannot be compared.
    """
    store, (repo, _, revision) = pins.store, name.rpartition("/")
    manifest = store.manifest(BASE_MODELS.folder, name)
    if manifest is None:
        return None
    where = f"{store.url}/{store.prefix(BASE_MODELS.folder, name)}"
    if is_gguf(repo):
        recorded = pins.hashes(repo, revision)
        if recorded is None:
            return None
        check_files(manifest, recorded, where)
    elif repo.startswith(NOT_ON_THE_HUB):
        if folder_revision({file.path: file.sha256 for file in manifest.files}) != revision:
            raise ForeignContent(
                f"{where}: the hashes of its files result in another revision than {revision}; somebody else wrote it, "
                "and it is not used. Check who may write there, then materialize cached_base_model again with force"
            )
    elif not _is_recorded(pins, repo, revision, manifest):
        _compare_with_hub(pins, repo, revision, manifest, where, trusted == f"{repo}@{revision}")
    return store.ref(BASE_MODELS.folder, name, manifest)


def _is_recorded(pins: Pins, repo: str, commit: str, manifest: Manifest) -> bool:
    return pins.hashes(repo, commit) == {file.path: file.sha256 for file in manifest.files}


def _compare_with_hub(pins: Pins, repo: str, commit: str, manifest: Manifest, where: str, runs_code: bool) -> None:
    """Compare the files with those of the commit on the Hub, and record their hashes."""
    recorded = pins.hashes(repo, commit)
    try:
        expected = _hashes_on_hub(pins.store, repo, commit, manifest)
    except (OSError, HTTPError, ValueError) as e:
        if recorded is not None:
            check_files(manifest, recorded, where)
        if runs_code:
            raise BaseModelError(
                f"{where}: model.trust_remote_code is {repo}@{commit}, but the Hub did not confirm that these are the "
                f"files of that commit ({e}); materialize cached_base_model while the Hub can be reached"
            ) from e
        logger.warning("%s: not compared with the Hub (%s); using the copy in the store", where, e)
        return
    check_files(manifest, expected, where)
    pins.record_hashes(repo, commit, expected)


def _hashes_on_hub(store: ArtifactStore, repo: str, commit: str, manifest: Manifest) -> dict[str, str]:
    """sha256 of the files that an artifact of this commit has, by path.

    For small files the Hub has git's hash, not the sha256, so their content in the store is read. Where it is another,
    so is the result.
    """
    tree = {path: file for path, file in hub.files_of(repo, commit, "model").items() if "/" not in path}
    expected = {path: "unknown" for path in tree if is_small_file(path)}
    for file in manifest.files:
        original = tree.get(file.path)
        if original is None:
            continue
        if original.lfs:
            expected[file.path] = original.lfs.sha256
        elif original.size == file.size:
            content = store.read(BASE_MODELS.folder, f"{repo}/{commit}", manifest, file.path)
            is_same = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == original.blob_id
            expected[file.path] = file.sha256 if is_same else f"of git blob {original.blob_id}"
    return expected
