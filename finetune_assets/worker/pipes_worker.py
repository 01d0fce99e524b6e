"""Where a job's own process tells how far it is: the terminal, and the Dagster run that waits for it."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from dagster_pipes import (
    PIPES_PROTOCOL_VERSION,
    PIPES_PROTOCOL_VERSION_FIELD,
    PipesDefaultMessageWriter,
    PipesEnvVarParamsLoader,
    PipesMessage,
    PipesMessageWriter,
    PipesMessageWriterChannel,
    PipesS3MessageWriter,
    PipesS3MessageWriterChannel,
)

from finetune_assets.store.objects import boto3_client


def in_terminal() -> None:
    """Print what this project logs on stderr."""
    package, terminal = logging.getLogger("finetune_assets"), logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    package.setLevel(logging.INFO)
    package.addHandler(terminal)
    package.propagate = False


MESSAGE_SECONDS = 5
"""How often messages are put into S3, and looked for there."""


def message_writer() -> PipesMessageWriter[Any]:
    """Takes messages to the run by the way that it listens on: a file, or objects of S3."""
    in_s3 = "bucket" in PipesEnvVarParamsLoader().load_messages_params()
    writer = _S3Writer() if in_s3 else PipesDefaultMessageWriter()
    return _Restarted(writer) if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) else writer


class _S3Writer(PipesS3MessageWriter):
    def __init__(self) -> None:
        self.s3 = boto3_client()
        super().__init__(self.s3, interval=MESSAGE_SECONDS)

    def make_channel(self, params: Mapping[str, Any]) -> PipesS3MessageWriterChannel:
        pages = self.s3.get_paginator("list_objects_v2")
        place = {"Bucket": params["bucket"], "Prefix": f"{params['key_prefix']}/"}
        told = sum(page["KeyCount"] for page in pages.paginate(**place))
        return _S3Channel(told, self.s3, params["bucket"], params["key_prefix"], interval=self.interval)


class _S3Channel(PipesS3MessageWriterChannel):
    """Numbers its objects after those of an earlier process; dagster-pipes itself writes over them."""

    def __init__(self, told: int, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.told = told

    def upload_messages_chunk(self, payload: IO[str], index: int) -> None:
        super().upload_messages_chunk(payload, self.told + index)


class _Restarted(PipesMessageWriter[Any]):
    """Of a worker that torchrun begins anew when it fails: the run listens on to the next one."""

    def __init__(self, writer: PipesMessageWriter[Any]) -> None:
        self.writer = writer

    @contextmanager
    def open(self, params: Mapping[str, Any]) -> Iterator[PipesMessageWriterChannel]:
        with self.writer.open(params) as channel:
            yield _RestartedChannel(channel)


class _RestartedChannel(PipesMessageWriterChannel):
    def __init__(self, channel: PipesMessageWriterChannel) -> None:
        self.channel = channel

    def write_message(self, message: PipesMessage) -> None:
        if not (message["method"] == "closed" and (message["params"] or {}).get("exception")):
            self.channel.write_message(message)


@contextmanager
def in_dagster_run() -> Iterator[None]:
    """Also tell it in the Dagster run, if one waits for this job.

    Messages alone, without opening the session: that is rank 0's, and what comes after it has closed is refused.
    """
    parameters = PipesEnvVarParamsLoader()
    if not parameters.is_dagster_pipes_process() or "bucket" in parameters.load_messages_params():
        yield  # objects of S3 have one writer only, which is rank 0; this goes by the job's log
        return
    package = logging.getLogger("finetune_assets")
    with PipesDefaultMessageWriter().open(parameters.load_messages_params()) as channel:
        handler = _PipesLog(channel)
        package.addHandler(handler)
        try:
            yield
        finally:
            package.removeHandler(handler)


class _PipesLog(logging.Handler):
    def __init__(self, channel: PipesMessageWriterChannel) -> None:
        super().__init__(logging.INFO)
        self.channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        told = {"message": record.getMessage(), "level": record.levelname}
        version = {PIPES_PROTOCOL_VERSION_FIELD: PIPES_PROTOCOL_VERSION}
        self.channel.write_message(PipesMessage(**version, method="log", params=told))  # type: ignore[typeddict-item]
