"""halfbyte: make a pretrained language model small, fast and yours, and measure what each step cost."""

from halfbyte.affine import Affine
from halfbyte.errors import BudgetExceeded, InputError
from halfbyte.formats import FORMATS
from halfbyte.kernels import dequantize, fake, quantize
from halfbyte.model import Model, load
from halfbyte.qtensor import QParams, QTensor
from halfbyte.run import Run

__version__ = "0.1.0"
__all__ = [
    "FORMATS", "Affine", "BudgetExceeded", "InputError", "Model", "QParams", "QTensor", "Run", "dequantize", "fake",
    "load", "quantize",
]  # fmt: skip
