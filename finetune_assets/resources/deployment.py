"""Environment variables of a deployment, with defaults for a single machine.

FINETUNE_CONFIGS: folder of the configuration files; default `configs/` in the project that the current folder is in.
FINETUNE_STORE: URL of the artifact store, `file:///folder` or `s3://bucket/prefix`; default
    `file://<project>/.finetune/store`. S3 reads credentials, endpoint and region from the environment:
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION,
    AWS_CA_BUNDLE.
FINETUNE_NAMESPACE: separates the artifacts of developers or branches; default the user name.
FINETUNE_CACHE: node-local folder for fetched artifacts and running jobs; default `<project>/.finetune/cache`.
FINETUNE_CACHE_LIMIT: maximum size of the fetched artifacts in that folder, such as `200GB`; default `100GB`.
FINETUNE_GROUP_ACCESS: `1` gives the user's group read and write access to the folder store and the node cache, which
    are private by default.
FINETUNE_RAW_DATA: overrides `source` in `configs/raw_data.yaml`.
"""

import getpass
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ByteSize, TypeAdapter, ValidationError

from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.errors import StoreError

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
WORKSPACE = "workspace.yaml"
IS_DEMO = "FINETUNE_DEMO"
"""Set by `use_demo`, so that a process that it starts does not switch again."""


def configs() -> Path:
    return Path(os.environ.get("FINETUNE_CONFIGS") or _project() / "configs").expanduser().resolve()


def _project() -> Path:
    """The project that the current folder is in, as `finetune init` creates it; otherwise the checkout of the code."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if _is_project(folder)), PACKAGE_PARENT)


def _is_project(folder: Path) -> bool:
    return (folder / WORKSPACE).is_file() and (folder / "configs" / "base.yaml").is_file()


def use_dagster_home() -> None:
    """Set DAGSTER_HOME to that of the project, unless it is set, so that runs are recorded."""
    home = root() / ".dagster_home"
    if "DAGSTER_HOME" not in os.environ and (home / "dagster.yaml").is_file():
        os.environ["DAGSTER_HOME"] = str(home)


def root() -> Path:
    """Project folder, to which relative paths in settings are resolved."""
    return configs().parent


def store_url() -> str:
    return os.environ.get("FINETUNE_STORE") or f"file://{root()}/.finetune/store"


def namespace() -> str:
    return os.environ.get("FINETUNE_NAMESPACE") or getpass.getuser()


def cache() -> Path:
    return (root() / Path(os.environ.get("FINETUNE_CACHE") or ".finetune/cache").expanduser()).resolve()


def cache_limit() -> int:
    """Maximum size of the cache, in bytes.

    Raises:
        StoreError: If FINETUNE_CACHE_LIMIT is not a size.
    """
    size = os.environ.get("FINETUNE_CACHE_LIMIT") or "100GB"
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError as e:
        raise StoreError(f"FINETUNE_CACHE_LIMIT: '{size}' is not a size; write it as 200GB") from e


def s3_client() -> Any:
    """boto3 S3 client, created by Dagster's resource from the environment."""
    from dagster_aws.s3 import S3Resource

    return S3Resource().get_client()


def store(connect: Callable[[], Any] = s3_client) -> ArtifactStore:
    return open_store(store_url(), namespace(), cache(), cache_limit(), connect)


def raw_data() -> str | None:
    return os.environ.get("FINETUNE_RAW_DATA")


def file_stamp(path: Path) -> tuple[int, int]:
    """Modification time in ns and size in bytes of a file, which indicate a change; zeros if it cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def use_demo() -> None:
    """Switch this process to the demo's deployment: packaged rows, with a namespace and a Dagster home of its own.

    Nothing that the demo materializes is therefore an input or a champion of the user's own experiments.
    """
    home = root() / ".finetune" / "demo"
    home.mkdir(parents=True, exist_ok=True)
    if IS_DEMO in os.environ:
        return
    use_dagster_home()
    settings = Path(os.environ["DAGSTER_HOME"]) / "dagster.yaml" if os.environ.get("DAGSTER_HOME") else None
    if settings and settings.is_file():
        tree = yaml.safe_load(settings.read_text(encoding="utf-8")) or {}
        kept = {name: value for name, value in tree.items() if "storage" not in name}  # its runs are in its own folder
        (home / "dagster.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    os.environ |= {
        IS_DEMO: "1",
        "FINETUNE_NAMESPACE": f"{namespace()}-demo",
        "FINETUNE_RAW_DATA": "sample",
        "DAGSTER_HOME": str(home),
    }
