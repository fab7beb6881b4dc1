"""What an adapter's GGUF file does not hold; test_llama_cpp.py has what llama.cpp makes of the rest."""

import pytest

from halfbyte import InputError, export, kinds, run
from halfbyte.kinds import gguf_lora
from halfbyte.recipe import save
from halfbyte.steps import Adapt
from miniatures import folder


def test_dora_is_refused_in_words(tmp_path):
    made = run.load(folder(tmp_path / "base"))
    Adapt(r=4, use_dora=True)(made)
    why = gguf_lora.refuses(kinds.Job(made.loaded))
    assert why is not None
    assert why.startswith("it is DoRA")
    path = save(made, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"DoRA.*`halfbyte merge` it instead"):
        export.prepare(export.read(path, adapter=True), gguf_lora, None, False, lambda line: None)
