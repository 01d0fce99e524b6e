"""Dagster Pipes messages from other machines to a run, through S3."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dagster_aws.pipes import PipesS3MessageReader

from finetune_assets.store.objects import boto3_client
from finetune_assets.worker.pipes_worker import MESSAGE_SECONDS


class Messages(PipesS3MessageReader):
    """Reads messages below the store's prefix. dagster-aws leaves them permanently at the bucket's top level.

    Args:
        prefix: Key prefix of the messages.
        bucket: Bucket of the store.
    """

    def __init__(self, prefix: str, bucket: str) -> None:
        super().__init__(bucket=bucket, client=boto3_client(), interval=MESSAGE_SECONDS)
        self.prefix = prefix

    @contextmanager
    def get_params(self) -> Iterator[dict[str, Any]]:
        with super().get_params() as parameters:
            yield {**parameters, "key_prefix": self.prefix}
