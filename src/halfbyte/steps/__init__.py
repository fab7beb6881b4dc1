"""The steps that methods are lists of. Each is a row in STEPS: its fields are the keys of a recipe."""

from __future__ import annotations

from halfbyte.steps.codes import Calibrated, Freeze, Transform
from halfbyte.steps.measuring import Evaluate
from halfbyte.steps.step import Positive, Step, check_length, checked, is_word, pad_id, read
from halfbyte.steps.trained import trainable
from halfbyte.steps.training import ENCODING, LEARNING_RATES, SHARES, Train
from halfbyte.steps.weights import Adapt, Dequantize, Grid, Merge, Teacher

__all__ = [
    "ENCODING", "LEARNING_RATES", "SHARES", "STEPS", "Adapt", "Calibrated", "Dequantize", "Evaluate", "Freeze", "Grid",
    "Merge", "Positive", "Step", "Teacher", "Train", "Transform", "check_length", "checked", "is_word", "pad_id",
    "read", "trainable",
]  # fmt: skip

STEPS: dict[str, type[Step]] = {
    "adapt": Adapt, "dequantize": Dequantize, "grid": Grid, "freeze": Freeze, "merge": Merge, "train": Train,
    "transform": Transform, "teacher": Teacher, "evaluate": Evaluate,
}  # fmt: skip
