"""What the pages' projects begin with."""

import shutil
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from projects import share_derived
from reading.blocks import begins_with
from reading.reader import Reader, copy_code, new_project
from servers.ceph import environment

from finetune_assets.worker import warm
from finetune_assets.worker.process import FORKSERVER


@pytest.fixture
def reader_of(tmp_path: Path, for_all_workers: Path, request: pytest.FixtureRequest) -> Callable[[Path], Reader]:
    """A page's reader, in a project that has what the page begins with."""

    def make(page: Path) -> Reader:
        reader, has = new_project(tmp_path / "project"), begins_with(page)
        assert has <= {"demo", "s3", "code"}
        share_derived(for_all_workers, reader.root / ".finetune" / "cache")
        if "code" not in has:  # what the tests' server forks is the code as it is
            reader.environment[FORKSERVER] = warm.own().address
        if "demo" in has:
            made = request.getfixturevalue("first_run")
            for name in (".finetune/store", ".dagster_home"):
                shutil.copytree(made / name, reader.root / name, dirs_exist_ok=True)
        if "code" in has:
            copy_code(reader)
        if "s3" in has:
            reader.environment.update(s3_account(request.getfixturevalue("_moto"), tmp_path / "aws"))
        return reader

    return make


def s3_account(endpoint: str, profiles: Path) -> dict[str, str]:
    """The bucket `my-bucket`, and an AWS profile `mine` that may use it, as a person has them."""
    server = environment(endpoint)
    keys = {name.lower(): server[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(Bucket="my-bucket")
    lines = ["[profile mine]", *(f"{name} = {value}" for name, value in keys.items())]
    profiles.write_text("\n".join([*lines, f"endpoint_url = {endpoint}", "region = us-east-1"]), encoding="utf-8")
    return {"AWS_CONFIG_FILE": str(profiles), "AWS_EC2_METADATA_DISABLED": "true"}
