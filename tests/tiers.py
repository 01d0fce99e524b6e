"""Which cases of a test are for `make test`, and which are for `make test-system` alone."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def tiered(cases: Iterable[Any], every_change: Container[Any]) -> list[Any]:
    """Parameters of a test, of which those in `every_change` are in `make test`."""
    return [pytest.param(case, marks=[] if case in every_change else pytest.mark.system) for case in cases]
