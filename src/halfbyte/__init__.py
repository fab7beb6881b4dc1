"""halfbyte: make a pretrained language model small, fast and yours, and measure what each step cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.affine import Affine
    from halfbyte.batch_norm import fold_batch_norms
    from halfbyte.errors import BudgetExceeded, InputError
    from halfbyte.formats import FORMATS
    from halfbyte.kernels import dequantize, fake
    from halfbyte.model import Model, load
    from halfbyte.modules import freeze, prepare_qat, quantize
    from halfbyte.qtensor import QParams, QTensor
    from halfbyte.run import Run

__version__ = "0.1.0"
__all__ = [
    "FORMATS", "Affine", "BudgetExceeded", "InputError", "Model", "QParams", "QTensor", "Run", "dequantize", "fake",
    "fold_batch_norms", "freeze", "load", "prepare_qat", "quantize",
]  # fmt: skip

_HOME = {
    "FORMATS": "formats", "Affine": "affine", "BudgetExceeded": "errors", "InputError": "errors", "Model": "model",
    "QParams": "qtensor", "QTensor": "qtensor", "Run": "run", "dequantize": "kernels", "fake": "kernels",
    "fold_batch_norms": "batch_norm", "freeze": "modules", "load": "model", "prepare_qat": "modules",
    "quantize": "modules",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # a name is fetched when it is first used: `halfbyte --help` should not wait for torch
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
