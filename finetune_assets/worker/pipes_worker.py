"""Progress reports of a job's process, to the terminal and to the Dagster run (Dagster Pipes)."""

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

from finetune_assets.display import PlainRecords
from finetune_assets.store.objects import boto3_client


def in_terminal() -> None:
    """Print this project's log messages on stderr."""
    package, terminal = logging.getLogger("finetune_assets"), logging.StreamHandler(sys.stderr)
    terminal.addFilter(PlainRecords())
    terminal.setFormatter(logging.Formatter("%(message)s"))
    package.setLevel(logging.INFO)
    package.addHandler(terminal)
    package.propagate = False


MESSAGE_SECONDS = 5
"""Interval at which messages are written to S3, and polled there."""


def message_writer() -> PipesMessageWriter[Any]:
    """Return the writer for the channel that the Dagster run reads: a file, or objects on S3."""
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
        sent = sum(page["KeyCount"] for page in pages.paginate(**place))
        return _S3Channel(sent, self.s3, params["bucket"], params["key_prefix"], interval=self.interval)


class _S3Channel(PipesS3MessageWriterChannel):
    """Continues the object numbers of an earlier process, whose objects dagster-pipes would overwrite."""

    def __init__(self, sent: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sent = sent

    def upload_messages_chunk(self, payload: IO[str], index: int) -> None:
        super().upload_messages_chunk(payload, self.sent + index)


class _Restarted(PipesMessageWriter[Any]):
    """Writer of a worker that torchrun restarts on failure. Hides the failure, so that the run reads on."""

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
    """Also send log messages to the Dagster run, if one waits for this job.

    Sends messages without opening the Pipes session: rank 0 opens the session, and messages after its end are rejected.
    """
    parameters = PipesEnvVarParamsLoader()
    if not parameters.is_dagster_pipes_process() or "bucket" in parameters.load_messages_params():
        yield  # S3 objects have a single writer, rank 0; these messages only appear in the job's log
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
        message = {"message": record.getMessage(), "level": record.levelname}
        version = {PIPES_PROTOCOL_VERSION_FIELD: PIPES_PROTOCOL_VERSION}
        self.channel.write_message(PipesMessage(**version, method="log", params=message))  # type: ignore[typeddict-item]
