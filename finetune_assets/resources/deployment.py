"""Environment variables of a deployment, with defaults for a single machine.

FINETUNE_CONFIGS: folder of the configuration files; default `configs/` in the project.
FINETUNE_STORE: URL of the artifact store, `file:///folder` or `s3://bucket/prefix`; default
    `file://<project>/.finetune/store`. S3 reads credentials, endpoint and region from the environment:
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION,
    AWS_CA_BUNDLE.
FINETUNE_NAMESPACE: separates the artifacts of developers or branches; default the user name.
FINETUNE_CACHE: node-local folder for fetched artifacts and running jobs; default `<project>/.finetune/cache`.
FINETUNE_CACHE_LIMIT: maximum size of the fetched artifacts in that folder, such as `200GB`; default `100GB`.
FINETUNE_RAW_DATA: overrides `source` in `configs/raw_data.yaml`.
"""

import getpass
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.errors import StoreError

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
DEMO = "-demo"
"""End of the demo's namespace."""


def configs() -> Path:
    return Path(os.environ.get("FINETUNE_CONFIGS") or PACKAGE_PARENT / "configs").expanduser().resolve()


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


def use_demo() -> None:
    """Switch this process to the demo's deployment: packaged rows, with a namespace and a Dagster home of its own.

    Nothing that the demo materializes is therefore an input or a champion of the user's own experiments.
    """
    home = root() / ".finetune" / "demo"
    home.mkdir(parents=True, exist_ok=True)
    settings = Path(os.environ.get("DAGSTER_HOME", "")) / "dagster.yaml"
    if settings.is_file() and settings.parent != home:
        shutil.copyfile(settings, home / "dagster.yaml")
    if not namespace().endswith(DEMO):
        os.environ["FINETUNE_NAMESPACE"] = namespace() + DEMO
    os.environ |= {"FINETUNE_RAW_DATA": "sample", "DAGSTER_HOME": str(home)}
