"""What is said of an output's size beforehand, against what is then written."""

import pytest
import torch

import miniatures
from halfbyte import export, kinds, outputs, run, steps
from halfbyte.errors import InputError
from halfbyte.folders import disk_bytes
from halfbyte.footprint import FOLDER, GGUF, footprint, usual
from halfbyte.formats import parse
from halfbyte.layers import ops
from halfbyte.scheme import Rule, Scheme


def formats(names):
    return [parse(n) for n in names]


def mixed(sizes, which):
    """A scheme with the which-th format of every weight's own, from its smallest on."""
    options = {n: sorted(c, key=c.get) for n, c in sizes.choices.items()}
    picked = {n: o[which % len(o)] for n, o in options.items()}
    rules = [Rule(n.replace(".", r"\."), f) for n, f in picked.items()] + [Rule(".*", None, why="kept")]
    return Scheme("mixed", tuple(rules)), sizes.rest + sum(sizes.choices[n][f] for n, f in picked.items())


@pytest.mark.parametrize(("name", "own"), [("llama", {}), ("llama-untied", {"hidden_size": 256}), ("qwen2", {})])
@pytest.mark.parametrize("which", [0, 3])
def test_a_file_is_as_large_as_said(tmp_path, name, own, which):
    path = miniatures.folder(tmp_path / "m", name, words=miniatures.bpe(), **own)
    loaded = run.load(path, weights=False).loaded
    sizes = footprint(loaded, formats(GGUF), True, disk=True)
    assert not sizes.kept
    scheme, said = mixed(sizes, which)
    kind, out = kinds.KINDS["gguf"], tmp_path / "out.gguf"
    export.export(path, export.job(loaded, kind, scheme, False), kind, out, None)
    assert said - 2500 <= out.stat().st_size <= said


@pytest.mark.parametrize(("name", "own"), [("llama", {}), ("llama-untied", {"hidden_size": 256}), ("mixtral", {})])
@pytest.mark.parametrize("which", [0, 3])
def test_a_folder_is_as_large_as_said(tmp_path, name, own, which):
    path = miniatures.folder(tmp_path / "m", name, torch.bfloat16, words=miniatures.bpe(), **own)
    made = run.load(path)
    sizes = footprint(made.loaded, formats(FOLDER), False, disk=True)
    assert "embedding" in sizes.kept["model.embed_tokens"]
    scheme, said = mixed(sizes, which)
    steps.Freeze(scheme=scheme)(made)
    size = disk_bytes(outputs.save(made, tmp_path / "out"))
    tensors = 8 * len(list(ops(made.model)))
    assert said - 200 * tensors <= size <= said


@pytest.mark.parametrize("as_gguf", [True, False])
def test_bits_are_those_that_a_run_counts(tmp_path, as_gguf):
    made = run.load(miniatures.folder(tmp_path / "m", words=miniatures.bpe()))
    sizes = footprint(made.loaded, formats(GGUF if as_gguf else FOLDER), as_gguf, disk=False)
    scheme, said = mixed(sizes, 1)
    steps.Freeze(scheme=scheme)(made)
    assert made.bits_per_weight() == pytest.approx(8 * said / sizes.parameters)
    assert sizes.least <= said <= sizes.most


def test_what_does_not_fit_anywhere(tmp_path):
    loaded = run.load(miniatures.folder(tmp_path / "m", words=miniatures.bpe()), weights=False).loaded
    with pytest.raises(InputError, match="q4_k fits any weight"):
        footprint(loaded, formats(["q4_k"]), True, disk=True)
    with pytest.raises(InputError, match="nf4-g64"):
        footprint(loaded, formats(["nf4-g64", "int3-g64"]), False, disk=True)
    some = footprint(loaded, formats(["q4_k", "q8_0"]), True, disk=True)
    assert all([f.name for f in c] == ["q8_0"] for c in some.choices.values())


def test_positions_and_routers_are_kept(tmp_path):
    for name, as_gguf, part in (("gpt2", True, "transformer.wpe"), ("qwen3-moe", False, "gate")):
        loaded = run.load(miniatures.folder(tmp_path / name, name, words=miniatures.bpe()), weights=False).loaded
        sizes = footprint(loaded, formats(GGUF if as_gguf else FOLDER), as_gguf, disk=False)
        assert not any(n.endswith(part) for n in sizes.choices)
        assert (part in sizes.kept) == as_gguf


def test_what_is_usual_fits_a_layout(tmp_path):
    for name, width in (("llama", 3), ("gpt2", 2)):
        loaded = run.load(miniatures.folder(tmp_path / name, name, words=miniatures.bpe()), weights=False).loaded
        found = usual(loaded, False)
        assert any(f.bits == width for f in found)
        assert (len(found) == len(FOLDER)) == (name == "llama")
        assert footprint(loaded, found, False, disk=True).choices
