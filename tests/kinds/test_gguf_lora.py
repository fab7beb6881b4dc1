"""What an adapter's GGUF file does not hold; test_llama_cpp.py has what llama.cpp makes of the rest."""

import pytest
import torch
from gguf import GGUFReader

from halfbyte import InputError, export, kinds, run
from halfbyte.kinds import gguf_lora
from halfbyte.layers import weights
from halfbyte.outputs import save
from halfbyte.qtensor import added
from halfbyte.steps import Adapt
from miniatures import folder, quantized


@torch.no_grad()
def test_qa_lora_is_written_as_the_lora_that_adds_the_same(tmp_path):
    made = run.load(folder(tmp_path / "base"))
    Adapt(r=4, use_qalora=True, qalora_group_size=16)(made)
    for w in weights(made.model).values():
        for a in w.adapters.values():
            a.lora_B.normal_(std=0.1)
    job = kinds.Job(made.loaded)
    assert gguf_lora.refuses(job) is None
    gguf_lora.write(job, tmp_path / "lora.gguf")
    read = {t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(tmp_path / "lora.gguf").tensors}
    a, b = (read[f"blk.0.ffn_down.weight.lora_{k}"] for k in "ab")
    wanted = weights(made.model)["model.layers.0.mlp.down_proj.weight"].adapters["default"].delta()
    torch.testing.assert_close(8 * b @ a, wanted)  # alpha 32 / r 4


@torch.no_grad()
def test_qa_lora_beside_codes_is_written_as_what_zero_points_hold_of_it(tmp_path):
    made = quantized(folder(tmp_path / "base", dtype=torch.bfloat16), "uint4-g32-affine")
    Adapt(r=4, use_qalora=True)(made)
    for w in weights(made.model).values():
        for a in w.adapters.values():
            a.lora_B.normal_(std=1e-3)
    gguf_lora.write(kinds.Job(made.loaded), tmp_path / "lora.gguf")
    read = {t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(tmp_path / "lora.gguf").tensors}
    a, b = (read[f"blk.0.ffn_down.weight.lora_{k}"] for k in "ab")
    w = weights(made.model)["model.layers.0.mlp.down_proj.weight"]
    before, shift = added(w.stored.q).clone(), w.adapters["default"].delta()
    w.merge()
    written = b @ a * (32 / a.shape[0])
    torch.testing.assert_close(written, (added(w.stored.q) - before).repeat_interleave(32, 1))
    assert (written - shift).abs().mean() > 0.1 * shift.abs().mean()  # of which that dtype loses much


def test_dora_is_refused_in_words(tmp_path):
    made = run.load(folder(tmp_path / "base"))
    Adapt(r=4, use_dora=True)(made)
    why = gguf_lora.refuses(kinds.Job(made.loaded))
    assert why is not None
    assert why.startswith("it is DoRA")
    path = save(made, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"DoRA.*`halfbyte merge` it instead"):
        export.prepare(export.read(path, adapter=True), gguf_lora, None, False, lambda line: None)
