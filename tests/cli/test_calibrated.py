"""Quantizing by what a model is fed: calibration text, importance matrices, solvers, into folders and files."""

import json

import pytest
import torch

from halfbyte import models, run
from halfbyte.layers import Linear, ops
from matrices import as_gguf, entries
from miniatures import folder


@pytest.fixture
def text(tiny_data):
    return tiny_data["text"]


def values(path):
    return {n: op.weight.value().float() for n, op in ops(run.load(path).model)}


def differ(a, b):
    a, b = values(a), values(b)
    return {n for n in a if not torch.equal(a[n], b[n])}


@pytest.fixture
def squares(tiny_llama):
    """An importance of every linear layer's inputs, by GGUF's names: one input in eight matters."""
    names = {"self_attn": "attn", "mlp": "ffn", "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output",
             "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}  # fmt: skip
    out = {}
    for n, op in ops(run.load(tiny_llama).model):
        if isinstance(op, Linear) and n.startswith("model.layers"):
            _, _, layer, part, proj = n.split(".")
            name = f"blk.{layer}.{names[part]}_{names[proj]}.weight"
            out[name] = torch.where(torch.arange(op.in_features) % 8 == 0, 10.0, 0.001)
    return out


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_folder_by_text(halfbyte, tiny_llama, text, tmp_path, solver):
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert halfbyte("quantize", tiny_llama, "--to", "W4A16", "-o", plain).status == 0
    said = halfbyte("quantize", tiny_llama, "--to", "W4A16", "--solver", solver, "--calibration", text, "--samples", 4,
                    "-o", out)  # fmt: skip
    assert said.status == 0, said.err
    assert "not used" not in said.err
    assert differ(plain, out) == {n for n in values(out) if "layers" in n}
    assert json.loads((out / "halfbyte.json").read_text())["calibrated"] is True


@pytest.mark.parametrize("how", ["calibration", "imatrix", "gptq"])
@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_a_file_by_text_or_by_a_matrix(halfbyte, tiny_llama, text, squares, tmp_path, verb, how):
    plain, out = tmp_path / "plain.gguf", tmp_path / "out.gguf"
    assert halfbyte("quantize", tiny_llama, "--to", "Q4_0", "-o", plain, "--no-verify").status == 0
    more = {
        "calibration": ["--calibration", text],
        "imatrix": ["--imatrix", as_gguf(tmp_path / "i.gguf", squares)],
        "gptq": ["--solver", "gptq", "--calibration", text],
    }[how]
    to = ["--to", "Q4_0"] if verb == "quantize" else ["--to", "gguf", "--format", "Q4_0"]
    said = halfbyte(verb, tiny_llama, *to, *more, "-o", out, "--no-verify")
    assert said.status == 0, said.err
    assert out.stat().st_size == plain.stat().st_size
    changed = differ(plain, out)
    assert {n for n in values(out) if "layers" in n} <= changed
    assert all(op.weight.format.name == "q4_0" for n, op in ops(run.load(out).model) if "layers" in n)


def test_a_matrix_moves_errors_to_where_they_do_not_matter(halfbyte, tiny_llama, squares, tmp_path):
    old = tmp_path / "imatrix.dat"
    old.write_bytes(entries(squares))
    for name, more in (("plain", []), ("matrix", ["--imatrix", old])):
        assert halfbyte("quantize", tiny_llama, "--to", "int3-g32", *more, "-o", tmp_path / name).status == 0
    floats, plain, matrix = (values(p) for p in (tiny_llama, tmp_path / "plain", tmp_path / "matrix"))
    for n in floats:
        if "layers" in n:
            here, there = ((v[n] - floats[n])[:, ::8].square().sum() for v in (matrix, plain))
            assert here < 0.7 * there


def test_what_does_not_go_together_is_refused(halfbyte, refused, tiny_llama, text, squares, tmp_path):
    out, matrix = tmp_path / "out", as_gguf(tmp_path / "i.gguf", squares)
    quantize = ("quantize", tiny_llama, "--to", "W4A16", "-o", out)
    refused(*quantize, "--solver", "gptq", "--calibration", "none", words=("--calibration none", "gptq needs text"))
    refused(*quantize, "--solver", "gptq", "--imatrix", matrix, words=("--imatrix", "gptq"))
    refused(*quantize, "--imatrix", matrix, "--calibration", text, words=("--imatrix", "--calibration"))
    refused(*quantize, "--imatrix", tmp_path / "nothing", words="nothing")
    refused(*quantize, "--imatrix", text, words="no importance matrix")
    refused(*quantize, "--calibration", tmp_path / "nothing", words="nothing")
    refused("export", tiny_llama, "--to", "gguf", "--calibration", text, "-o", tmp_path / "o.gguf", words="--format")
    wrong = as_gguf(tmp_path / "w.gguf", {"blk.0.attn_q.weight": torch.ones(7)})
    refused(*quantize, "--imatrix", wrong, words=("another model", "7 inputs"))
    other = as_gguf(tmp_path / "x.gguf", {"blk.99.attn_q.weight": torch.ones(64)})
    refused(*quantize, "--imatrix", other, words="names none")
    assert not out.exists()


def test_what_is_asked_for_and_not_had_or_not_used_is_said(halfbyte, refused, tiny_llama, text, tmp_path, caplog):
    said = halfbyte("quantize", tiny_llama, "--to", "W4A16", "--solver", "gptq", "--calibration", text,
                    "--samples", 9999, "--max-length", 8000, "--no-verify", "-o", tmp_path / "a")  # fmt: skip
    assert said.status == 0, said.err
    notes = json.loads((tmp_path / "a" / "halfbyte.json").read_text())["calibration"]
    assert f"--samples 9999: the calibration text has {notes['rows']} rows" in caplog.text
    assert "--max-length 8000: this model takes" in caplog.text
    assert "--no-verify is not used" in said.err
    said = halfbyte("quantize", tiny_llama, "--to", "W4A16", "--samples", 3, "-o", tmp_path / "b")
    assert "--samples is not used: rtn" in said.err
    out = ("-o", tmp_path / "c")
    refused("quantize", tiny_llama, "--to", "W4A16", "--transform", "awq", "--untie", *out, words="--untie")
    text_of_2 = ("--solver", "gptq", "--calibration", text, "--max-length", 2)
    refused("quantize", tiny_llama, "--to", "W4A16", *text_of_2, *out, words="--max-length 2")


@pytest.mark.parametrize(("to", "out"), [("Q4_0", "o.gguf"), ("int4-g32", "o")])
def test_a_model_that_overflows_leaves_nothing_behind(refused, tmp_path, text, to, out):
    model = models.load(folder(tmp_path / "m", words=True))
    up = dict(ops(model.model))["model.layers.1.mlp.up_proj"].weight
    up.store(torch.full(tuple(up.shape), 3e38))
    (tmp_path / "broken").mkdir()
    models.save(model, tmp_path / "broken")
    solver = ("--solver", "gptq", "--calibration", text, "--max-length", 32)
    refused("quantize", tmp_path / "broken", "--to", to, *solver, "-o", tmp_path / out, words="NaN or infinity")
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize("verb", ["quantize", "plan"])
def test_models_that_no_text_can_be_put_to_are_refused_by_either_verb(refused, tmp_path, verb):
    more = ("-o", tmp_path / "out") if verb == "quantize" else ()
    for name, words in (("bert", "--calibration FILE"), ("t5", "reads one text and writes another")):
        model = folder(tmp_path / name, name, words=True)
        refused(verb, model, "--to", "int4-g32", "--solver", "gptq", *more, words=words)


def test_codes_on_another_grid_are_not_solved_again_unasked(halfbyte, refused, tiny_llama, text, tmp_path):
    model = tmp_path / "q.gguf"
    assert halfbyte("quantize", tiny_llama, "--to", "Q8_0", "-o", model, "--no-verify").status == 0
    again = ("export", model, "--to", "gguf", "--format", "Q4_0", "--calibration", text, "--no-verify", "-o")
    refused(*again, tmp_path / "a.gguf", words="--requantize")
    assert halfbyte(*again, tmp_path / "a.gguf", "--requantize").status == 0


def test_a_merge_is_quantized_by_text_too(halfbyte, refused, tiny_llama, text, tmp_path):
    adapter = tmp_path / "adapter"
    said = halfbyte(
        "train", tiny_llama, "--data", text, "--method", "lora", "--steps", 1, "--max-length", 32, "-o", adapter
    )
    assert said.status == 0, said.err
    merge = ("merge", adapter, "--solver", "gptq", "--calibration", text, "--samples", 2)
    refused(*merge, "-o", tmp_path / "out", words="--to")
    assert halfbyte("merge", adapter, "--to", "W4A16", "-o", tmp_path / "plain").status == 0
    for out in ("out", "out.gguf"):
        said = halfbyte(*merge, "--to", "W4A16" if out == "out" else "Q4_0", "--no-verify", "-o", tmp_path / out)
        assert said.status == 0, said.err
    assert differ(tmp_path / "plain", tmp_path / "out")


def test_an_adapter_onto_codes_that_text_found_is_refused_before_the_work(
    halfbyte, refused, tiny_llama, text, tmp_path
):
    recipe = tmp_path / "r.yaml"
    freeze = {"scheme": "W4A16", "solver": "gptq", "calibration": str(text)}
    steps = [{"freeze": freeze}, {"adapt": {"r": 2}}, {"train": {"data": str(text), "steps": 1, "max_length": 32}}]
    made = {"model": str(tiny_llama), "output": str(tmp_path / "out"), "steps": steps}
    recipe.write_text(json.dumps(made))
    refused("run", recipe, words="quantize to a folder")
    recipe.write_text(json.dumps({**made, "steps": [*steps, "merge"]}))
    assert halfbyte("run", recipe).status == 0


def test_a_group_size_holds_in_files_too(halfbyte, tiny_llama, tmp_path):
    out = ("-o", tmp_path / "m.onnx", "--no-verify", "--json")
    sizes = [
        halfbyte("quantize", tiny_llama, "--to", "W4A16", *group, *out, "--overwrite").json["bytes"]
        for group in ((), ("--group-size", 32), ("--group-size", 16))
    ]
    assert sizes[2] > sizes[1]
