"""`finetune` in this process, as the shell runs it."""

from typing import NamedTuple

import pytest

from finetune_assets.cli.main import finetune


class Ended(NamedTuple):
    """Exit code, and what was printed on stdout and on stderr."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ended:
    """`finetune ARGUMENTS`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        finetune.main(arguments, prog_name="finetune")
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, *capsys.readouterr())
