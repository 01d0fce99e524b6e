"""Names of files and things on the pages of the report."""

import re
from datetime import UTC, datetime
from pathlib import Path

from finetune_assets.config.fingerprint import fingerprint

SHORT = 12
"""Digits of a fingerprint that are shown."""
PLAIN_NAME = re.compile(r"(?!.*-[0-9a-f]{12}\Z)[a-z0-9][a-z0-9._-]{0,99}")
"""Names that are file names as they are, on all file systems. A name that ends like a hash is not among them, so that
no other name has the same file."""
UNSAFE = re.compile("[^a-z0-9]+")


def short(fingerprint: str) -> str:
    return fingerprint[:SHORT]


def moment(written: str) -> str:
    """Format an ISO 8601 timestamp in UTC, so that the page does not depend on the local time zone."""
    return f"{datetime.fromisoformat(written).astimezone(UTC):%Y-%m-%d %H:%M}"


def pages_folder(file: Path) -> str:
    """Name of the folder with a page for each experiment, beside the overview."""
    return f"{file.stem}-experiments"


def page_file(experiment: str) -> str:
    """Name of an experiment's page, unique also where the file system ignores case.

    An adapter in the store may name any text as its experiment.
    """
    if PLAIN_NAME.fullmatch(experiment):
        return f"{experiment}.html"
    readable = UNSAFE.sub("-", experiment.lower())[:40].strip("-")
    return f"{readable or 'experiment'}-{fingerprint(experiment=experiment)[:SHORT]}.html"
