"""What a step does when its work fails: told plainly, tried again only where that may help, and ended when asked to."""

from collections.abc import Callable

import dagster as dg
import pytest

from finetune_assets.assets import materialization
from finetune_assets.errors import UserError


class Passing(UserError):
    retriable = True


def outcome(fail: Callable[[int], None], retried: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, int, str]:
    """Whether a step succeeded, how often it was begun, and what it said last."""
    monkeypatch.setattr(materialization, "RETRY_SECONDS", 0)
    begun: list[int] = []

    @dg.op
    def step(context: dg.OpExecutionContext) -> None:
        with materialization.asset_step(context, retried):  # type: ignore[arg-type]
            begun.append(context.retry_number)
            fail(context.retry_number)

    @dg.job
    def work() -> None:
        step()

    result = work.execute_in_process(raise_on_error=False)
    failures = [event for event in result.all_node_events if event.is_step_failure]
    error = failures[0].step_failure_data.error if failures else None
    while error and error.cause:
        error = error.cause
    return result.success, len(begun), error.message if error else ""


def failing(error: Exception, times: int = 99) -> Callable[[int], None]:
    def fail(attempt: int) -> None:
        if attempt < times:
            raise error

    return fail


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (UserError("a.yaml: rank: 0 must be at least 1"), 1),
        (Passing("the store does not answer"), 4),
        (ConnectionResetError("reset"), 4),
        (PermissionError(13, "Permission denied", "/store"), 1),
        (RuntimeError("a GPU fell off the bus"), 4),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    success, begun, said = outcome(failing(error), True, monkeypatch)
    assert (success, begun) == (False, attempts)
    assert str(error).rpartition("] ")[2].partition(":")[0] in said
    assert outcome(failing(error), False, monkeypatch)[:2] == (False, 1)


def test_what_passes_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(failing(Passing("busy"), times=2), True, monkeypatch)[:2] == (True, 3)


def test_a_step_that_a_person_ends_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(attempt: int) -> None:
        raise dg.DagsterExecutionInterruptedError

    assert outcome(end, True, monkeypatch)[:2] == (False, 1)
