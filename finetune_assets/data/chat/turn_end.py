"""How a chat template ends an assistant turn, which is also where generation has to stop."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_assets.data.chat.messages import parsed, shapes
from finetune_assets.data.chat.template import ChatTemplate
from finetune_assets.data.errors import RefusedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class TurnEnd:
    """What a chat template writes after an assistant turn.

    Attributes:
        text: The text; empty if it writes nothing.
        tokens: Ids of the tokens in it that end generation, in order; empty if it consists of ordinary text.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> TurnEnd:
    """The end of an assistant turn in the tokenizer's chat template.

    Raises:
        DataError: if the tokenizer has no usable chat template.
    """
    try:
        text = ChatTemplate(tokenizer).frame(shapes(parsed(TURNS)), with_tools=False).pieces.texts[-1]
    except RefusedRow:  # a template for other conversations only, such as those with a system turn
        return TurnEnd()
    ids = tokenizer.encode(text.strip(), add_special_tokens=False)
    added = {*tokenizer.get_added_vocab().values()}
    ends = tuple(dict.fromkeys(i for i in ids if i in added)) or (tuple(ids) if len(ids) == 1 else ())
    return TurnEnd(text, ends)
