"""Where a job's own process tells how far it is: the terminal, and the Dagster run that waits for it."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dagster_pipes import (
    PIPES_PROTOCOL_VERSION,
    PIPES_PROTOCOL_VERSION_FIELD,
    PipesDefaultMessageWriter,
    PipesEnvVarParamsLoader,
    PipesMessage,
    PipesMessageWriter,
    PipesMessageWriterChannel,
    PipesS3MessageWriter,
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
    if "bucket" in PipesEnvVarParamsLoader().load_messages_params():
        return PipesS3MessageWriter(boto3_client(), interval=MESSAGE_SECONDS)
    return PipesDefaultMessageWriter()


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
