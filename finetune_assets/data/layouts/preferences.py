"""Judged answers: pairs of a chosen and a rejected answer (DPO), and single answers with a label (KTO).

A pair is read as two rows that differ in their answers alone, each in the layout of the rest of the row, so texts,
turns and whole conversations are accepted as they are without a judgement. Only what is judged is learned: assistant
turns of the shared prompt have the weight 0.
"""

from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any

from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.instruction import conversation
from finetune_assets.data.layouts.joining import speaker, turns_of
from finetune_assets.data.layouts.values import Values, is_empty, shortened
from finetune_assets.data.rows import Row, Turn

COLUMNS = {
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response", "rejected_responses"),
    "label": ("label", "kto_tag", "thumbs"),
    "adapter": ("adapter",),
}
"""Accepted names of each column of a judgement; `adapter` names the served adapter that gave the rejected or labelled
answer."""
TRUTHS = {"true": True, "false": False}
THUMBS = {"up": True, "thumbs_up": True, "👍": True, "down": False, "thumbs_down": False, "👎": False}
NUMBERS = {"1": True, "0": False, "-1": False}
"""Labels as texts. Numbers are labels only in a column that the settings name, or in `thumbs`: a `label` of 1 is
usually a class."""
Read = Callable[[Values], Row]


def judged_row(values: Values, is_named: bool, read: Read) -> Row | None:
    """Read a pair or a labelled answer; None if the row has no judgement.

    Args:
        values: The row, with the names of `COLUMNS`.
        is_named: Whether the settings name the column of the label.
        read: Reads a row without a judgement.

    Raises:
        BadRow: naming the problem, if the judgement is incomplete, contradictory or ambiguous.
    """
    row = _judged(values, is_named, read)
    adapter = values.text("adapter").strip() if row else ""
    return {**row, "adapter": adapter} if row and adapter else row


def _judged(values: Values, is_named: bool, read: Read) -> Row | None:
    pair = [name for column in ("chosen", "rejected") if (name := values.find(column)[0])]
    labels = dict(_labels(values, is_named))
    if pair and labels:
        raise BadRow(f"'{pair[0]}' and '{next(iter(labels))}' are two judgements of one row; write a row for each")
    if pair:
        return _pair(values, read)
    if len({*labels.values()}) > 1:
        raise BadRow(" and ".join(f"'{name}'" for name in labels) + " contradict each other; keep one of them")
    if labels:
        row = read(_without(values, *labels))
        return {**row, "messages": _judged_turns(row["messages"]), "label": next(iter(labels.values()))}
    return None


def _labels(values: Values, is_named: bool) -> Iterator[tuple[str, bool]]:
    for name in values.names["label"]:
        value = values.row.get(name)
        if is_empty(value):
            continue
        is_certain = is_named or name == "thumbs"
        text = str(int(value) if isinstance(value, float) and value == value // 1 else value).strip().lower()
        label = ({**TRUTHS, **THUMBS, **NUMBERS} if is_certain else TRUTHS).get(text)
        if label is not None:
            yield name, label
        elif is_certain:
            raise BadRow(f"'{name}' must be true or false (or up or down, 1 or 0), found {shortened(value)}")


def _pair(values: Values, read: Read) -> Row:
    (chosen_name, chosen), (rejected_name, rejected) = values.find("chosen"), values.find("rejected")
    bare = _without(values, *values.names["chosen"], *values.names["rejected"])
    if rejected_name is None:
        raise BadRow(
            f"'{values.names['rejected'][0]}' is missing beside '{chosen_name}'; give both answers of the pair"
        )
    worse = _with_answer(_without_answer(bare), rejected_name, rejected)
    better = bare if chosen_name is None else _with_answer(bare, chosen_name, chosen)
    chosen_name = chosen_name or bare.find("response")[0] or bare.find("messages")[0]
    if chosen_name is None:
        raise BadRow(f"'chosen' is missing beside '{rejected_name}'; give both answers of the pair")
    good, bad = (
        _side(side, name, read) for side, name in zip((better, worse), (chosen_name, rejected_name), strict=True)
    )
    return _combined(good, bad, chosen_name, rejected_name)


def _side(values: Values, name: str, read: Read) -> Row:
    try:
        return read(values)
    except BadRow as e:
        raise e if f"'{name}'" in str(e) else BadRow(f"in '{name}': {e}") from e


def _with_answer(values: Values, name: str, answer: Any) -> Values:
    """The row with one of the pair's answers: a text, a turn, turns, or a whole conversation."""
    if name == "rejected_responses" and isinstance(answer, list):
        if len(answer) != 1:
            raise BadRow(f"'{name}' has {len(answer)} answers; write a row for each pair")
        (answer,) = answer
    answer = [answer] if isinstance(answer, dict) else answer
    turns = turns_of(answer)
    if turns is None and not isinstance(answer, str):
        raise BadRow(f"'{name}' must be text or a list of turns, found {shortened(answer)}")
    column = "messages" if turns and speaker(turns[0]) in ("system", "user") else "response"
    other, value = values.find(column)
    if other is not None and value != answer:
        raise BadRow(f"'{other}' and '{name}' both have a value, and one would be lost; remove one")
    row = values.row if other is None else _without(values, *values.names[column]).row
    return Values({**row, name: answer}, {**values.names, column: (name,)})


def _without_answer(values: Values) -> Values:
    """The row without its own answer: that of the column, or the turns after the last user turn."""
    name, messages = values.find("messages")
    turns = turns_of(messages)
    row = _without(values, *values.names["response"]).row
    if name is None or turns is None:
        return Values(row, values.names)
    answer = [*takewhile(lambda turn: speaker(turn) != "user", reversed(turns))]
    return Values({**row, name: turns[: len(turns) - len(answer)]}, values.names)


def _without(values: Values, *keys: str) -> Values:
    return Values({key: value for key, value in values.row.items() if key not in keys}, values.names)


def _combined(chosen: Row, rejected: Row, chosen_name: str, rejected_name: str) -> Row:
    """One row of the two sides of a pair."""
    names = f"'{chosen_name}' and '{rejected_name}'"
    if chosen["messages"] is None and rejected["messages"] is None:
        prompts = [(row["instruction"].strip(), row["context"].strip()) for row in (chosen, rejected)]
        if prompts[0] != prompts[1]:
            raise BadRow(f"{names} do not share a prompt; write pairs of answers to the same prompt")
        if chosen["response"].strip() == rejected["response"].strip():
            raise BadRow(f"{names} are equal, so there is nothing to prefer; remove the row")
        return {**chosen, "rejected": rejected["response"], "rejected_messages": None}
    turns, others = _turns(chosen), _turns(rejected)
    if [*map(_bare, turns)] == [*map(_bare, others)]:
        raise BadRow(f"{names} are equal, so there is nothing to prefer; remove the row")
    shared = sum(1 for _ in takewhile(lambda pair: _bare(pair[0]) == _bare(pair[1]), zip(turns, others, strict=False)))
    for side, name in ((turns, chosen_name), (others, rejected_name)):
        if shared == len(side) or side[shared]["role"] != "assistant" or shared == 0:
            raise BadRow(
                f"{names} do not share a prompt: they differ from turn {shared + 1} on, which must be the assistant's "
                f"in both, but is {shortened(side[shared]['role']) if shared < len(side) else 'missing'} in '{name}'"
            )
    return {
        **chosen,
        "messages": _unlearned(turns, shared),
        "rejected": rejected["response"],
        "rejected_messages": _unlearned(others, shared),
    }


def _turns(row: Row) -> list[Turn]:
    return row["messages"] or conversation(row["instruction"], row["context"], row["response"])


def _bare(turn: Turn) -> Turn:
    """A turn without its weight, which is no part of the prompt."""
    return {key: value for key, value in turn.items() if key != "weight"}


def _unlearned(turns: list[Turn], count: int) -> list[Turn]:
    """The turns with weight 0 for the assistant's among the first ones."""
    prompt = [{**turn, "weight": 0.0} if turn["role"] == "assistant" else turn for turn in turns[:count]]
    return [*prompt, *turns[count:]]


def _judged_turns(turns: list[Turn] | None) -> list[Turn] | None:
    """The turns of a labelled conversation: what follows the last user turn is judged."""
    if turns is None:
        return None
    users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    return _unlearned(turns, users[-1] if users else 0)
