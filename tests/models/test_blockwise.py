"""Quantizing a model that stays on disk: the same bytes as in memory, a block at a time, and on from where it ended."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from halfbyte import InputError, models, run
from halfbyte.folders import CHECKPOINT
from halfbyte.layers import ops, weights
from halfbyte.steps import Freeze
from miniatures import folder, logits

TEXT = [{"text": f"some words, number {i}, and more of them"} for i in range(40)]


def freeze(**settings):
    return Freeze(**{"scheme": "int4-g32", "samples": 3, "max_length": 16, **settings})


def quantized(source, out, at=None, **settings):
    """Written from a model on disk, or from memory where there is no place `at` to keep blocks."""
    made = run.load(source, weights=at is None)
    freeze(**settings, work=at)(made)
    out.mkdir()
    made.write(out, out.name)
    return made


CASES = {
    "rtn": {}, "gptq": {"solver": "gptq", "calibration": TEXT}, "weighed": {"calibration": TEXT},
    "own text": {"solver": "gptq", "calibration": "self"}, "learned": {"solver": "autoround", "calibration": TEXT},
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("case", CASES)
def test_from_disk_as_from_memory_to_the_byte(tmp_path, name, case):
    source = folder(tmp_path / "m", name, torch.bfloat16, words=True)
    quantized(source, tmp_path / "memory", **CASES[case])
    made = quantized(source, tmp_path / "disk", tmp_path / "work", **CASES[case])
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "disk" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()
    assert made.bits_per_weight() == run.load(tmp_path / "disk").bits_per_weight()


@pytest.mark.parametrize("calibration", [TEXT, "self"])
def test_no_more_than_a_block_is_in_memory(tmp_path, calibration):
    source = folder(tmp_path / "m", "llama-untied", words=True, num_hidden_layers=4)
    made, held = run.load(source, weights=False), []

    def look(done, total):
        held.append(sum(p.nbytes for p in made.model.parameters() if p.device.type != "meta"))

    freeze(solver="gptq", calibration=calibration, on_block=look, work=tmp_path / "work")(made)
    norm = sum(p.nbytes for n, p in made.model.named_parameters() if n == "model.norm.weight")
    assert held == [norm] * 4
    assert all(w.device.type == "meta" for w in weights(made.model).values())
    made.read_weights()
    assert logits(made.model).isfinite().all()


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "solver"), [("llama-untied", "gptq"), ("llama-untied", "autoround"), ("neox", "gptq")]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, name, solver, after):
    source = folder(tmp_path / "m", name, words=True, num_hidden_layers=2)
    scheme = [{"match": m, "weight": "int4-g32"} for m in ("@linear", "@head")] + [{"match": "@embedding"}]
    settings = {"solver": solver, "calibration": TEXT, "scheme": scheme}
    quantized(source, tmp_path / "whole", **settings)

    def stop(done, total):
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(source, tmp_path / "stopped", tmp_path / "work", **settings, on_block=stop)
    solved = []
    done = {f.name for f in (tmp_path / "work").glob("*.safetensors")}
    assert len(done) == after
    times = {f: (tmp_path / "work" / f).stat().st_mtime_ns for f in done}
    quantized(source, tmp_path / "on", tmp_path / "work", **settings, on_block=lambda i, n: solved.append(i))
    assert {f: (tmp_path / "work" / f).stat().st_mtime_ns for f in done} == times
    assert (tmp_path / "on/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path):
    source = folder(tmp_path / "m", words=True)
    quantized(source, tmp_path / "a", tmp_path / "work")
    others = (({"scheme": "int8-channel"}, "scheme int4-g32, not int8-channel"), ({"solver": "gptq"}, "solver"))
    for other, said in others:
        with pytest.raises(InputError, match=rf"--resume: .* begun with {said}"):
            quantized(source, tmp_path / "b", tmp_path / "work", **other)
    (source / "model.safetensors").touch()
    with pytest.raises(InputError, match="begun with weights"):
        quantized(source, tmp_path / "b", tmp_path / "work")


def test_codes_of_another_shape_are_refused(tmp_path):
    source = folder(tmp_path / "m", words=True)
    quantized(source, tmp_path / "a", tmp_path / "work")
    first, second = sorted((tmp_path / "work").glob("*.safetensors"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(InputError, match="lacks the codes"):
        quantized(source, tmp_path / "b", tmp_path / "work")


TO_A_SCHEME = ("--to", "int4-g32", "--solver", "gptq")
TO_A_LOSS = ("--max-kl", "1e-3")  # which takes several tries


def begun(source, text, *how, script=("-m", "halfbyte")):
    """The command, but for its output."""
    return [sys.executable, *script, "quantize", str(source), *(how or TO_A_SCHEME),
            "--calibration", str(text), "--samples", "2", "--max-length", "32"]  # fmt: skip


def check_gone_on(command, tmp_path):
    """What a killed command left in tmp_path becomes what one that was not killed writes."""
    assert not (tmp_path / "killed").exists()
    again = subprocess.run([*command, "-o", str(tmp_path / "killed")], capture_output=True, text=True)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    subprocess.run([*command, "-o", str(tmp_path / "killed"), "--resume"], check=True, stderr=subprocess.DEVNULL)
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, stderr=subprocess.DEVNULL)
    files = {f.name for f in (tmp_path / "whole").iterdir()}
    assert files == {f.name for f in (tmp_path / "killed").iterdir()}
    for f in files - {"README.md"}:  # which names the folder
        assert (tmp_path / "killed" / f).read_bytes() == (tmp_path / "whole" / f).read_bytes()
    assert not (tmp_path / "killed.partial").exists()


@pytest.fixture
def text(tmp_path):
    (tmp_path / "t.txt").write_text("some words and more of them. " * 99)
    return tmp_path / "t.txt"


def killed_once_there_are(files, pattern, command, tmp_path):
    work = tmp_path / f"killed.partial/{CHECKPOINT}"
    process = subprocess.Popen([*command, "-o", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    while len(list(work.glob(pattern))) < files:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("how", [TO_A_SCHEME, (*TO_A_SCHEME, "--transform", "awq")])
def test_a_command_killed_while_it_solves_goes_on_to_the_same_bytes(tmp_path, text, how):
    command = begun(folder(tmp_path / "m", words=True, num_hidden_layers=24), text, *how)
    killed_once_there_are(3, "*.safetensors", command, tmp_path)
    check_gone_on(command, tmp_path)


def test_a_climb_that_is_killed_goes_on_in_the_try_where_it_was(tmp_path, text):
    command = begun(folder(tmp_path / "m", words=True, num_hidden_layers=12), text, *TO_A_LOSS)
    killed_once_there_are(3, "try-2/*.safetensors", command, tmp_path)
    check_gone_on(command, tmp_path)


KILLED = """
import os, signal, sys
from halfbyte.models import saving
written = saving.write_shards

def some(folder, tensors, *args):
    def until():
        for i, tensor in enumerate(tensors):
            if i == 25:
                os.kill(os.getpid(), signal.SIGKILL)
            yield tensor
    return written(folder, until(), *args)

saving.write_shards = some
from halfbyte.cli import main
main(sys.argv[1:])
"""


def test_a_command_killed_while_it_writes_goes_on_to_the_same_bytes(tmp_path, text):
    source = folder(tmp_path / "m", words=True, num_hidden_layers=4)
    killed = subprocess.run(
        [*begun(source, text, script=("-c", KILLED)), "-o", str(tmp_path / "killed")], stderr=subprocess.DEVNULL
    )
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed.partial").glob("part-0.*"))
    check_gone_on(begun(source, text), tmp_path)


def test_norms_and_positions_come_and_go_with_their_block(tmp_path):
    loaded = models.load(folder(tmp_path / "m", "gpt2", words=True), weights=False)
    blockwise = models.Blockwise(models.Kept(loaded, tmp_path / "work", {}))
    inside = [n for n, _ in loaded.model.named_parameters() if n.startswith("transformer.h.1.")]
    here = dict(loaded.model.named_parameters())
    assert all(here[n].device.type == "meta" for n in inside)
    blockwise.bring("transformer.h.1")
    here = dict(loaded.model.named_parameters())
    assert all(here[n].device.type == "cpu" for n in inside)
    assert all(p.device.type == "meta" for n, p in here.items() if n.startswith("transformer.h.0."))
    blockwise.let_go("transformer.h.1")
    assert all(dict(loaded.model.named_parameters())[n].device.type == "meta" for n in inside)
    assert {n for n, op in ops(loaded.model) if op.weight.device.type == "meta"} == {n for n, _ in ops(loaded.model)}
