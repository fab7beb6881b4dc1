"""What a user can get wrong: exit status 2, one sentence, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.containers import shards

STEP = ("--steps", "1", "--batch-size", "2", "--max-length", "64")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def quantizing(refused, out):
    """Refuses to quantize a model."""
    return lambda model, words, *more: refused("quantize", model, "--to", "W8A16", "-o", out, *more, words=words)


@pytest.fixture
def training(refused, tiny_llama, tiny_data, out):
    """Refuses to train with some options."""

    def call(words, *more, model=tiny_llama, data=tiny_data["text"]):
        return refused("train", model, "--data", data, *STEP, "-o", out, *more, words=words)

    return call


# --- models that cannot be read


def test_missing_models(quantizing, tmp_path):
    quantizing(tmp_path / "nowhere", ("nowhere", "no such file or folder"))
    quantizing(tmp_path / "nowhere.gguf", "no such file or folder")
    quantizing("./models/nowhere", "no such file or folder")


def test_a_hub_id_that_cannot_be_had(quantizing, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    quantizing("nobody/nothing", ("nobody/nothing", "no such folder here, and the hub did not give it"))


def test_folder_without_config(quantizing, copied):
    (copied / "config.json").unlink()
    quantizing(copied, "config.json is missing.")


def test_a_file_that_is_no_model(quantizing, copied):
    quantizing(copied / "model.safetensors", "neither a model's folder nor a .gguf file")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"model_type": "llama", "hidden_size": "wide"}',
                                  '{"model_type": "llama", "num_hidden_layers": -1}', '{"model_type": "xyz"}', "{}",
                                  '{"model_type": "llama", "architectures": ["NoSuchModel", 5]}',
                                  '{"model_type": "llama", "architectures": 5}'])  # fmt: skip
def test_broken_config(quantizing, copied, text):
    (copied / "config.json").write_text(text, encoding="latin-1")
    quantizing(copied, str(copied))


def test_code_that_wants_to_be_trusted(quantizing, copied):
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.Mine"}}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "mine.py").write_text("raise SystemExit('it ran')")
    quantizing(copied, "halfbyte runs no code from a checkpoint")


def test_pickle(quantizing, copied):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    quantizing(copied, ("pytorch_model.bin is a pickle file", "convert it to safetensors"))


@pytest.mark.parametrize("keep", [0, 7, 100, -1000])
def test_truncated_safetensors(quantizing, copied, keep):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    quantizing(copied, "model.safetensors")


@pytest.mark.parametrize("junk", [b"garbage " * 50, struct.pack("<Q", 20) + b"not json at all, sir"])
def test_broken_safetensors(quantizing, copied, junk):
    (copied / "model.safetensors").write_bytes(junk)
    quantizing(copied, "is not a safetensors file")


def test_truncated_and_missing_shard(quantizing, copied):
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    shards.write_shards(copied, tensors.items(), max_shard=150_000)
    second = copied / "model-00002-of-00003.safetensors"
    second.write_bytes(second.read_bytes()[:-10])
    quantizing(copied, (second.name, "truncated"))
    second.unlink()
    quantizing(copied, second.name)


def test_missing_and_misshapen_tensors(quantizing, copied):
    tensors = load_file(copied / "model.safetensors")
    less = {k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}
    save_file(less, copied / "model.safetensors", metadata={"format": "pt"})
    quantizing(copied, "model.layers.1.mlp.up_proj.weight")
    less["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
    save_file(less, copied / "model.safetensors", metadata={"format": "pt"})
    quantizing(copied, ("model.layers.1.mlp.up_proj.weight", "(3, 64)", "(128, 64)"))


def test_nan_in_a_weight(quantizing, copied):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    quantizing(copied, "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("data", [b"", b"garbage", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_broken_gguf(quantizing, tmp_path, data):
    (tmp_path / "model.gguf").write_bytes(data)
    quantizing(tmp_path / "model.gguf", "model.gguf")


def test_broken_tokenizer(quantizing, copied):
    (copied / "tokenizer.json").write_text("{")
    quantizing(copied, "its tokenizer cannot be read")


def test_text_needs_a_tokenizer(refused, training, untokenized, tiny_data):
    training("has no tokenizer", model=untokenized)
    refused("evaluate", untokenized, "--data", tiny_data["text"], words="has no tokenizer")
    refused("generate", untokenized, "--prompt", "The fox", words="has no tokenizer")


# --- names and numbers


@pytest.mark.parametrize(("scheme", "near"), [("W4A61", "W4A16"), ("nf5", "NF4"), ("int4-g65x", "int4-g64")])
def test_unknown_scheme(refused, tiny_llama, tiny_data, out, scheme, near):
    refused("quantize", tiny_llama, "--to", scheme, "-o", out, words=("is no scheme", f"did you mean {near}"))
    refused("plan", tiny_llama, "--to", scheme, words=near)
    refused("train", tiny_llama, "--data", tiny_data["text"], "--method", "qat", "--to", scheme, "-o", out, words=near)


@pytest.mark.parametrize("group", [48, 0, -64])
def test_group_size_that_does_not_fit(refused, tiny_llama, out, group):
    said = refused("quantize", tiny_llama, "--to", "W4A16", "--group-size", group, "-o", out, words=str(group))
    if group == 48:
        assert "--group-size 32" in said


@pytest.fixture
def wide_llama(copied):
    """The tiny model with 256 inputs everywhere, which q4_k's super-blocks divide."""
    config = LlamaConfig.from_pretrained(copied)
    config.hidden_size = config.intermediate_size = 256
    config.head_dim, config.num_hidden_layers = 128, 1
    LlamaForCausalLM(config).save_pretrained(copied)
    return copied


@pytest.mark.parametrize("scheme", ["q4_k", "q4_0", "fp8-e5m2-channel"])
def test_a_scheme_that_no_folder_holds_is_refused_before_the_work(
    refused, wide_llama, tiny_data, out, monkeypatch, scheme
):
    monkeypatch.setattr("halfbyte.run.freeze", lambda *a, **k: pytest.fail("the work had begun"))
    monkeypatch.setattr("halfbyte.steps.training.train", lambda *a, **k: pytest.fail("the work had begun"))
    words = ("no folder layout that others read", f"no layout for {scheme}")
    refused("quantize", wide_llama, "--to", scheme, "-o", out, words=words)
    files = scheme != "fp8-e5m2-channel"  # into which an adapter could be merged
    for method in ("qat", "scales") if files else ("qat", "qat-lora", "scales"):
        data = ("--data", tiny_data["text"], "--method", method)
        why = "cannot be trained" if (method, scheme) == ("scales", "q4_k") else words  # whose scales are codes
        refused("train", wide_llama, *data, "--to", scheme, "-o", out, words=why)


def test_static_inputs_without_text_or_a_known_search(refused, tiny_llama, tiny_data, tmp_path, out):
    to = ("--to", "W8A8_STATIC")
    none = (*to, "--calibration", "none", "-o")
    refused("quantize", tiny_llama, *none, out, words=("W8A8_STATIC", "needs --calibration FILE"))
    refused("quantize", tiny_llama, *none, tmp_path / "m.onnx", words=("inputs of model", "add --calibration FILE"))
    refused("export", tiny_llama, "--format", "W8A8_STATIC", "-o", tmp_path / "m.onnx", words="quantize first with it")
    searched = (*to, "--calibration", tiny_data["text"], "--input-search", "median")
    refused("quantize", tiny_llama, *searched, "-o", out, words=("'median'", "minmax, mse and percentile-P"))
    step = ("--data", tiny_data["text"], *STEP, *to, "-o", out)
    refused("train", tiny_llama, "--method", "qat", *step, words="train through a scheme that rounds by token")
    refused("train", tiny_llama, "--method", "qlora", *step, words="needs --calibration FILE")


def test_quantize_says_what_is_wrong_with_its_text_before_it_reads_the_model(refused, tiny_llama, tmp_path, out):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txet": "two"}\n')
    for file, words in (("none.jsonl", "none.jsonl"), ("bad.jsonl", ("bad.jsonl, line 2", "txet"))):
        said = refused("quantize", tiny_llama, "--to", "W4A16", "--solver", "gptq", "--calibration", tmp_path / file,
                       "-o", out, words=words)  # fmt: skip
        assert len(said.splitlines()) == 1  # no plan


def test_unknown_names(refused, training, tiny_llama, out):
    refused("quantize", tiny_llama, "--to", "W8A16", "--solver", "gptp", "-o", out, words=("gptp", "rtn"))
    refused("quantize", tiny_llama, "--to", "W8A16", "--dtype", "int8", "-o", out, words=("int8", "bfloat16"))
    training(("sft", "full, lora, qlora"), "--method", "sft")
    training("cosine, linear, constant", "--lr-scheduler-type", "polynomial")
    training("needs --to SCHEME", "--method", "qat")
    training("takes no --to", "--to", "W4A16")
    training("gptp", "--method", "scales", "--to", "W4A16", "--init", "gptp")
    training(
        "does not take r, use_dora, adapter", "--method", "full", "--r", "64", "--use-dora", "--adapter", "nowhere"
    )
    training("--method qat, qat-lora, scales", "--method", "qlora", "--init", "gptq")
    training("--eval-data", "--method", "qat", "--to", "W4A16", "--init", "gptq", "--eval-split", "0.5")
    training("qat, qat-lora, scales", "--loss", "kl")
    training("ce", "--loss", "mse")
    training(("--teacher", "--loss kl"), "--method", "qat", "--to", "W4A16", "--teacher", tiny_llama)


@pytest.mark.parametrize(("option", "value"),
    [("--r", 0), ("--lr", -1), ("--lr", 0), ("--steps", 0), ("--steps", -1), ("--epochs", 0), ("--batch-size", 0),
     ("--max-length", 1), ("--lora-dropout", 1), ("--eval-split", 1), ("--eval-split", -0.1), ("--warmup-ratio", -1),
     ("--gradient-accumulation-steps", 0), ("--max-grad-norm", 0), ("--save-steps", -1), ("--eval-steps", -1),
     ("--init-lora-weights", "pisa"), ("--init-lora-weights", "loftq"),
     ("--lr", "nan"), ("--target-modules", "no_such_layer"), ("--target-modules", "(")],
)  # fmt: skip
def test_impossible_settings(training, option, value):
    said = training((), option, value)
    name = {"--lr": "learning"}.get(option, option.strip("-"))
    assert name.split("-")[0] in said.splitlines()[-1]


def test_target_modules_that_meet_nothing_name_what_there_is(training):
    training(("wq", "q_proj"), "--target-modules", "wq,wv")


@pytest.mark.parametrize(
    ("option", "value"), [("--context", 0), ("--batch-size", 0), ("--max-windows", 0), ("--max-windows", -1)]
)
def test_impossible_measurements(refused, tiny_llama, tiny_data, option, value):
    refused("evaluate", tiny_llama, "--data", tiny_data["text"], option, value)


def test_a_context_longer_than_the_model_takes(refused, training, copied, tiny_data):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    refused("evaluate", copied, "--data", tiny_data["text"], words=("512", "32", "--context 32"))
    training(("64", "32", "--max-length 32"), model=copied)
    refused("generate", copied, "--prompt", "The fox", "--max-new-tokens", 64, words=("32", "--max-new-tokens"))


def test_budget_without_reference(refused, tiny_llama, tiny_data):
    refused("evaluate", tiny_llama, "--data", tiny_data["text"], "--max-kl", 1, words="--against")


def test_reference_with_another_vocabulary(refused, tiny_llama, copied, tiny_data):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(310, 64)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"vocab_size": 310}))
    refused("evaluate", tiny_llama, "--data", tiny_data["text"], "--against", copied, words=("310", "vocabulary"))


def test_generate_needs_something_to_go_on_from(refused, tiny_llama, copied, monkeypatch):
    refused("generate", tiny_llama, "--prompt", "", words="--prompt is empty")
    refused("generate", tiny_llama, words="no terminal")
    refused("generate", tiny_llama, "--prompt", "x", "--max-new-tokens", 0, words="--max-new-tokens")
    refused("generate", tiny_llama, "--prompt", "x", "--temperature", -1, words="--temperature")
    (copied / "chat_template.jinja").unlink()
    refused("generate", copied, "--prompt", "x", "--chat", words="no chat template")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    refused("generate", tiny_llama, "--json", words="--json needs a --prompt")
    refused("generate", copied, words="no chat template")


# --- data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', ("bad.jsonl, line 2", "not valid JSON")),
        ("key.jsonl", b'{"text": "fine"}\n{"txt": "x"}\n', ("key.jsonl, line 2", '"txt"')),
        ("type.jsonl", b'{"text": 5}\n', ("line 1", '"text" must be a string')),
        ("mixed.jsonl", b'{"text": "x"}\n{"prompt": "x", "completion": "y"}\n', ("line 2", "a file of its own")),
        ("binary.jsonl", b"\x00\x01\x02", "binary file"),
        ("latin.txt", "für".encode("latin-1"), "not UTF-8"),
        ("table.csv", b"a,b\n", ".jsonl"),
    ],
)
def test_bad_data(training, refused, tiny_llama, tiny_data, tmp_path, monkeypatch, name, content, words):
    monkeypatch.setattr("halfbyte.run.load", lambda *a, **k: pytest.fail("the model was read before the data"))
    (tmp_path / name).write_bytes(content)
    training(words, data=tmp_path / name)
    training(words, "--eval-data", tmp_path / name)
    refused("evaluate", tiny_llama, "--data", tmp_path / name, words=words)


def test_data_that_is_not_there(training, refused, tiny_llama, tmp_path):
    training("nowhere.jsonl does not exist.", data=tmp_path / "nowhere.jsonl")
    training("is a folder", data=tmp_path)
    refused("evaluate", tiny_llama, "--data", tmp_path / "nowhere.jsonl", words="does not exist")


def test_conversations_without_a_template(training, copied, tiny_data):
    (copied / "chat_template.jinja").unlink()
    training(("line 1", "chat template"), model=copied, data=tiny_data["messages"])


# --- outputs


def test_output_that_exists(refused, tiny_llama, tiny_data, out, monkeypatch):
    monkeypatch.setattr("halfbyte.run.load", lambda *a, **k: pytest.fail("the work had begun"))
    out.mkdir()
    for verb in (("quantize", tiny_llama, "--to", "W8A16"), ("train", tiny_llama, "--data", tiny_data["text"]),
                 ("merge", tiny_llama)):  # fmt: skip
        refused(*verb, "-o", out, words=("exists already", "--overwrite"))


def test_overwrite_replaces_nothing_that_is_not_a_result(refused, tiny_llama, tmp_path, out):
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    quantize = ("quantize", tiny_llama, "--to", "W8A16", "--overwrite", "-o")
    refused(*quantize, out, words="nothing that halfbyte wrote")
    refused(*quantize, out / "thesis.tex", words="nothing that halfbyte wrote")
    assert (out / "thesis.tex").read_text() == "years of work"


def test_overwrite_does_not_replace_what_is_read(halfbyte, refused, tiny_llama, tiny_data, out):
    assert halfbyte("quantize", tiny_llama, "--to", "W8A16", "-o", out).status == 0
    refused("train", out, "--data", tiny_data["text"], "--overwrite", "-o", out, words="is read from there")


def test_output_under_a_file(quantizing, tmp_path, refused, tiny_llama):
    (tmp_path / "file").write_text("")
    refused("quantize", tiny_llama, "--to", "W8A16", "-o", tmp_path / "file" / "out", words="is a file, not a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_a_read_only_folder(refused, tiny_llama, tmp_path):
    (tmp_path / "fixed").mkdir(mode=0o500)
    refused("quantize", tiny_llama, "--to", "W8A16", "-o", tmp_path / "fixed" / "out", words="may not be written to")


class FullDisk:
    """Stands in for what writes tensors: the disk is full, as the system or as safetensors says it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"),
              RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")]
)  # fmt: skip
def test_no_space_left(halfbyte, training, tiny_llama, tmp_path, monkeypatch, error):
    full = FullDisk(error)
    monkeypatch.setattr("halfbyte.containers.peft.save_file", full)
    monkeypatch.setattr("halfbyte.containers.shards._Shard.add", lambda shard, name, tensor: full(tensor, shard.path))
    quantize = ("quantize", tiny_llama, "--to", "W4A16", "-o", tmp_path / "q")
    said = halfbyte(*quantize)
    assert (said.status, said.out) == (2, "")
    assert "no space left on the disk" in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["q.partial"]  # what was found is kept, to go on from
    training("no space left on the disk")
    training("no space left on the disk", "--method", "full")
    monkeypatch.undo()
    assert halfbyte(*quantize, "--resume").status == 0


# --- adapters


@pytest.fixture
def adapter(halfbyte, copied, tiny_data, tmp_path_factory):
    """A LoRA folder trained on `copied`."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    said = halfbyte("train", copied, "--data", tiny_data["text"], *STEP, "-o", folder)
    assert said.status == 0, said.err
    return folder


def test_adapter_without_its_base(refused, adapter, copied, out):
    copied.rename(copied.with_name("elsewhere"))
    refused("merge", adapter, "-o", out, words=(str(adapter), "its base model is no longer at"))
    refused("generate", adapter, "--prompt", "x", words="its base model")


def test_adapter_whose_base_has_changed(refused, training, adapter, copied, tiny_llama, out):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    refused("merge", adapter, "-o", out, words=("trained on other weights", "sha256"))
    training("trained on other weights", "--adapter", adapter, model=copied)


def test_merge_of_what_is_no_adapter(refused, tiny_llama, adapter, out):
    refused("merge", tiny_llama, "-o", out, words="has no adapter to merge")
    refused("merge", adapter, "-o", out, "--base", "new", words="trained, original, both")
    refused("merge", adapter, "-o", out, "--to", "q4_0", words="no folder layout")
    refused("merge", adapter, "-o", out, "--to", "W4A17", words="did you mean W4A16")


@pytest.mark.parametrize(("break_it", "words"), [
    (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    (lambda d: (d / "adapter_model.safetensors").write_bytes(b"junk" * 20), "is not a safetensors file"),
    (lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
    (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "IA3"),
    (lambda d: (d / "halfbyte.json").write_text("{"), "not valid JSON"),
    (lambda d: (d / "halfbyte.json").write_text('{"stored": "W4A17"}'), "W4A16"),
])  # fmt: skip
def test_broken_adapter(refused, adapter, out, break_it, words):
    break_it(adapter)
    refused("merge", adapter, "-o", out, words=words)


def test_adapter_that_is_not_there(training, tmp_path, tiny_llama):
    training("adapter_config.json is missing", "--adapter", tmp_path / "nowhere")
    training("adapter_config.json is missing", "--adapter", tiny_llama)


# --- usage


@pytest.mark.parametrize(("argv", "words"), [
    (["frobnicate"], "there is no command 'frobnicate'"),
    (["quantise"], "did you mean quantize?"),
    (["quantize"], "see halfbyte quantize --help."),
    (["train", "x", "--data", "y", "-o", "z", "--steps", "many"], ("--steps", "valid integer")),
    (["train", "x", "--data", "y", "-o", "z", "--learning-rate", "1"], "--learning-rate"),
    (["--frobnicate"], "--frobnicate"),
])  # fmt: skip
def test_usage(refused, argv, words):
    said = refused(*argv, words=words)
    assert said.count("\n") == 1


def test_exports_that_cannot_be(refused, halfbyte, tiny_llama, tiny_data, out):
    file = out.with_suffix(".gguf")
    refused("export", tiny_llama, "-o", out, words="--to is missing")
    refused("export", tiny_llama, "--to", "ggml", "-o", file, words="--to ggml: it is gguf")
    refused("export", tiny_llama, "-o", file, "--format", "Q4_K_X", words=("Q4_K_X", "did you mean"))
    refused("export", tiny_llama, "-o", file, "--format", "NF4", words="ggml has no block for nf4-g64")
    refused("export", tiny_llama, "--to", "hf", "-o", out, "--format", "W4A16", words="it holds floats alone")
    refused("export", tiny_llama, "--to", "gguf-lora", "-o", file, words="it is no adapter folder")
    refused("export", tiny_llama, "-o", file, "--data", "no-such.jsonl", words="no-such.jsonl")
    refused("export", out / "nowhere", "-o", file, words="no such file or folder")
    refused("quantize", tiny_llama, "--to", "Q4_K_M", "-o", out, words=("Q4_K_M is a mix", "OUT.gguf"))
    refused("quantize", tiny_llama, "--to", "W4A16", "-o", out.with_suffix(".onnx"), "--solver", "magic", words="magic")


def test_exports_over_what_is_there(refused, halfbyte, tiny_llama, out):
    file = out.with_suffix(".gguf")
    assert halfbyte("export", tiny_llama, "-o", file, "--no-verify").status == 0
    refused("export", tiny_llama, "-o", file, words="--overwrite")
    refused("export", file, "-o", file, "--overwrite", words="is what is read")
    assert halfbyte("export", tiny_llama, "-o", file, "--no-verify", "--overwrite", "--format", "Q8_0").status == 0
    refused("export", file, "-o", out.with_suffix(".onnx"), "--format", "W4A16", "--no-verify", words="--requantize")
