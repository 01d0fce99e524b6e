"""Which cases of a test are for `make test`, which for `make test-system`, and which for `make soak` alone."""

from collections.abc import Container, Iterable
from typing import Any

import pytest

SOAK = [pytest.mark.system, pytest.mark.soak]


def every_third(cases: Iterable[Any]) -> list[Any]:
    """Cases of a sweep for every change: every third one, beginning with the first."""
    return [*cases][::3]


def tiered(cases: Iterable[Any], every_change: Container[Any] = (), system: Container[Any] | None = None) -> list[Any]:
    """Parameters of a test, each in one tier.

    Args:
        cases: The cases.
        every_change: Cases for `make test`.
        system: Cases for `make test-system`; by default, all others. The rest is for `make soak`.
    """

    def marks(case: Any) -> list[pytest.MarkDecorator]:
        if case in every_change:
            return []
        return [pytest.mark.system] if system is None or case in system else SOAK

    return [pytest.param(case, marks=marks(case), id=case if isinstance(case, str) else None) for case in cases]
