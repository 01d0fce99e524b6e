"""The schema of raw data in Parquet."""

import pyarrow as pa

TURN = pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)])
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
            metadata={"doc": "the answer to learn; never blank. Of a conversation, the last assistant turn"},
        ),
        pa.field("category", pa.string(), nullable=False, metadata={"doc": "kind of task; may be empty"}),
        pa.field(
            "messages",
            pa.list_(pa.field("item", TURN, nullable=False)),
            metadata={
                "doc": "every turn of a conversation in order, system turn included, as role (system, user, assistant) "
                "and content; null where instruction and response are all there is"
            },
        ),
    ]
)
