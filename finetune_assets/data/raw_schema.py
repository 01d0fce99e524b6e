"""The schema of raw data in Parquet."""

import pyarrow as pa

TURN = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("reasoning_content", pa.string()),
        pa.field("tool_calls", pa.string()),
        pa.field("tool_call_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("weight", pa.float32()),
    ]
)
"""A turn of a conversation; `Turn` in data/rows.py describes its fields."""
RAW_SCHEMA = pa.schema(
    [
        pa.field(
            "instruction",
            pa.string(),
            nullable=False,
            metadata={"doc": "what is asked; never blank. Of a conversation, the first user turn, if any"},
        ),
        pa.field(
            "context",
            pa.string(),
            nullable=False,
            metadata={"doc": "text to answer from; may be empty. Of a conversation, its system turn"},
        ),
        pa.field(
            "response",
            pa.string(),
            nullable=False,
            metadata={
                "doc": "the answer to learn; never blank. Of a conversation, the last assistant turn that is learned: "
                "its content, or its tool calls if it has no content"
            },
        ),
        pa.field("category", pa.string(), nullable=False, metadata={"doc": "kind of task; may be empty"}),
        pa.field(
            "messages",
            pa.list_(pa.field("item", TURN, nullable=False)),
            metadata={
                "doc": "every turn of a conversation in order, system turn included, as role (system, user, assistant, "
                "tool), content, and where given reasoning_content, tool_calls (JSON), tool_call_id, name and weight "
                "(0: not learned); null where instruction and response are all there is"
            },
        ),
        pa.field(
            "tools",
            pa.string(),
            metadata={
                "doc": "tools that the assistant may call, as a JSON list of definitions; null if there are none"
            },
        ),
        pa.field(
            "rejected",
            pa.string(),
            metadata={"doc": "of a pair, the rejected answer, as `response` is the chosen one; null in other rows"},
        ),
        pa.field(
            "rejected_messages",
            pa.list_(pa.field("item", TURN, nullable=False)),
            metadata={
                "doc": "of a pair of conversations, every turn of the rejected one, as `messages` are those of the "
                "chosen one; null in other rows"
            },
        ),
        pa.field(
            "label",
            pa.bool_(),
            metadata={"doc": "of a labelled answer, whether it is good; null in other rows"},
        ),
        pa.field(
            "adapter",
            pa.string(),
            metadata={"doc": "name of the served adapter that gave the rejected or labelled answer; null if unknown"},
        ),
    ]
)
