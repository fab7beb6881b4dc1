"""Data: from files to batches of tokens, with masks that say what is learnt."""

from halfbyte.data.batches import Batch, batches, eval_batches, stacked
from halfbyte.data.chat import encode_chat
from halfbyte.data.encode import (
    Dataset,
    Row,
    encode,
    encode_choices,
    encode_classification,
    encode_prompt,
    end_of_text,
    label_choices,
    windows,
)
from halfbyte.data.records import Record, read_records, records, sha256, split

__all__ = [
    "Batch",
    "Dataset",
    "Record",
    "Row",
    "batches",
    "encode",
    "encode_chat",
    "encode_choices",
    "encode_classification",
    "encode_prompt",
    "end_of_text",
    "eval_batches",
    "label_choices",
    "read_records",
    "records",
    "sha256",
    "split",
    "stacked",
    "windows",
]
