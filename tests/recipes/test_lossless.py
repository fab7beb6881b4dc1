"""What you train is what ships: the trained model merged, saved and read back, in every format, bit for bit."""

import pytest
import torch

from halfbyte import InputError, export
from halfbyte.formats import FORMATS
from halfbyte.kinds import KINDS
from halfbyte.layers import Codes, weights
from halfbyte.model import load
from halfbyte.scheme import to_scheme
from miniatures import bpe, folder, logits, training_logits

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 2, "batch_size": 2, "max_length": 8, "learning_rate": 1e-2, "r": 4}
ADAPTERS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
UNHELD = {"fp4-e2m1-g32": (), "fp8-e5m2-channel": (), "nvfp4": (torch.bfloat16,)}  # but in these dtypes
KIND = {"uint8-g64-affine": "mlx", "uint4-g64-affine": "mlx", "uint4-g32-affine": "mlx"}  # else a folder, else gguf


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def base(request, tmp_path_factory):
    """As wide as a super-block of the K types."""
    path = tmp_path_factory.mktemp("base")
    return folder(path, dtype=request.param, words=bpe(), hidden_size=256, intermediate_size=256, num_hidden_layers=1)


def shipped(made, to, path):
    """The model as a folder or a file holds it, read back; None where none does."""
    try:
        made.holds(to_scheme(to))
        return load(made.save(path / "out"))
    except InputError:
        kind = KINDS[KIND.get(to, "gguf")]
    try:
        job = export.prepare(made.loaded, kind, None, False, print)
    except InputError:
        return None
    target = path / f"out{kind.SUFFIX}"
    if not kind.SUFFIX:
        target.mkdir()
    kind.write(job, target)
    return load(target, made.loaded.config.dtype)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.usefixtures("torch_products")
def test_qat_lora_ships_what_was_trained_in_every_format(tmp_path, base, to, adapter):
    made = load(base).train(method="qat-lora", to=to, **SHORT, **ADAPTERS[adapter])
    trained = training_logits(made.model)
    assert not torch.equal(trained, logits(load(base).quantize(to).model))
    assert torch.equal(logits(made.model), trained)
    made.merge()
    assert torch.equal(logits(made.model), trained)
    codes = {n: w.stored.q for n, w in weights(made.model).items() if isinstance(w.stored, Codes)}
    assert {q.format.name for q in codes.values()} == {to}
    read = shipped(made, to, tmp_path)
    dtype = made.loaded.config.dtype
    assert (read is not None) == (dtype in UNHELD.get(to, (dtype,)))
    if read is not None:
        assert torch.equal(logits(read.model), trained)
        assert {n for n, w in weights(read.model).items() if isinstance(w.stored, Codes)} == set(codes)
