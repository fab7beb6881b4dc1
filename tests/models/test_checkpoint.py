"""Quantized folders that come from anyone: what is broken in them is an InputError, and cheap."""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from halfbyte import kernels, models
from halfbyte.containers import CONTAINERS
from halfbyte.containers.shards import Shards
from halfbyte.errors import InputError
from halfbyte.models.checkpoint import Checkpoint, Folder
from miniatures import folder

SHAPE = (32, 64)


@dataclass
class Victim:
    """A folder of two weights and a norm, in parts: the header of its tensors, their bytes, and the config."""

    header: dict[str, Any]
    data: bytes
    config: dict[str, Any]

    def write(self, path: Path) -> None:
        self.write_text(path, json.dumps(self.header).encode(), self.data)

    @staticmethod
    def write_text(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
        path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def victim(method: str, *formats: str) -> Victim:
    """Weights in these formats as the method's container writes them; AWQ's, which none here writes, in zeros."""
    container, tensors = CONTAINERS[method], {}
    sites = {}
    for name, f in zip("ab", formats, strict=True):
        w = torch.randn(SHAPE).to(torch.bfloat16 if f in ("nvfp4", "mxfp4") else torch.float16)
        if method == "awq":
            words = {"qweight": torch.zeros(64, 4).int(), "qzeros": torch.zeros(2, 4).int()}
            tensors |= {f"{name}.{k}": v for k, v in words.items()} | {f"{name}.scales": torch.ones(2, 32).half()}
        else:
            q = kernels.quantize(w, f)
            sites[name] = (q, None)
            tensors |= container.encode(name, q)
    tensors["norm.weight"] = torch.ones(64)
    config = {"quant_method": "awq", "bits": 4, "version": "gemm"} if method == "awq" else container.config(sites, [])
    whole = save({k: t.contiguous() for k, t in tensors.items()})
    (n,) = struct.unpack("<Q", whole[:8])
    return Victim(json.loads(whole[8 : 8 + n]), whole[8 + n :], config)


VICTIMS: dict[str, Callable[[], Victim]] = {
    "gptq": lambda: victim("gptq", "int4-g32", "int8-channel"),
    "gptq-uint": lambda: victim("gptq", "uint4-g32", "uint4-g32"),
    "awq": lambda: victim("awq", "uint4-g32", "uint4-g32"),
    "mlx": lambda: victim("mlx", "int4-g32", "uint8-g64-affine"),
    "nf4": lambda: victim("bitsandbytes", "nf4-g64", "nf4-g64-dq"),
    "llm-int8": lambda: victim("bitsandbytes", "int8-bnb", "int8-bnb"),
    "fp4": lambda: victim("bitsandbytes", "fp4-bnb-g64", "fp4-bnb-g64"),
    "ct": lambda: victim("compressed-tensors", "uint4-channel", "uint4-channel"),
    "ct-fp4": lambda: victim("compressed-tensors", "nvfp4", "mxfp4"),
    "ct-int": lambda: victim("compressed-tensors", "int4-g32", "uint4-g32"),
    "ct-mixed": lambda: victim("compressed-tensors", "fp8-e4m3-channel", "int8-channel"),
}

# What stands where something else should.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 8, 16, 31, 32, 33, 63, 64, 65, 128, 2**31, 2**32, 2**63, 2**63 - 1, 2**64,
    10**30, 10**4000, -(2**63), 0.5, 4.0, 1e300, float("nan"), float("inf"), "", "4", "32", "int", "float", "linear",
    "re:.*", "re:(", "re:" + "(" * 3000, "re:a{99999999999999999999}", "re:(.*.*)*.*=$", "\ud800", "x" * 100_000,
    "group", "channel", "tensor", "token", "block", "tensor_group", "F32", "F16", "BF16", "I32", "U32", "U8", "I8",
    "F8_E4M3", "BOOL", [], {}, [[]], [0], [-1], [1, 2], [32, 64], [64, 32], [2**63, 2**63], [0, 0], [1] * 5000,
    [2**62] * 2000, {"a": {}}, {"bits": 4}, ["Linear"], ["re:.*"],
]  # fmt: skip
SUFFIXES = (
    "weight", "qweight", "qzeros", "scales", "biases", "g_idx", "weight_scale", "weight_packed", "weight_shape",
    "weight_zero_point", "weight_g_idx", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
    "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4", "weight.SCB", "SCB",
    "weight_format", "weight_global_scale", "input_scale",
)  # fmt: skip


def deep(rng: random.Random) -> Any:
    """Lists or objects within each other."""
    value: Any = rng.choice(ODD)
    for _ in range(rng.choice((10, 300, 600))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def changed(rng: random.Random, tree: Any, depth: int = 0) -> Any:
    """A JSON value with one place of it changed, left out, or put in."""
    if not isinstance(tree, dict | list) or not tree or (depth and rng.random() < 0.15):
        if isinstance(tree, int) and not isinstance(tree, bool) and rng.random() < 0.4:
            return rng.choice((tree + 1, tree - 1, -tree, tree * 2, tree // 2, tree * 2**32))
        return deep(rng) if rng.random() < 0.03 else copy.deepcopy(rng.choice(ODD))
    out = copy.copy(tree)
    if isinstance(out, list):
        at = rng.randrange(len(out))
        if rng.random() < 0.1:
            del out[at]
        else:
            out[at] = changed(rng, out[at], depth + 1)
        return out
    key = rng.choice(list(out))
    luck = rng.random()
    if luck < 0.1:
        del out[key]
    elif luck < 0.15:
        out[rng.choice((*map(str, out), "a", "x" * 300, "dynamic", "mode", "load_in_8bit"))] = rng.choice(ODD)
    else:
        out[key] = changed(rng, out[key], depth + 1)
    return out


def renamed(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A tensor under another's name, twice, or as a part that is not there yet; two tensors' bytes exchanged."""
    out = dict(header)
    name, other = rng.choice(list(out)), rng.choice(list(out))
    luck = rng.random()
    if luck < 0.15:  # all parts of a weight become another's
        module, new = name.split(".")[0], rng.choice(("a", "b", "norm", "c"))
        out |= {n.replace(f"{module}.", f"{new}.", 1): e for n, e in out.items() if n.startswith(f"{module}.")}
    elif luck < 0.4:
        new = f"{rng.choice(('a', 'b', 'norm', 'c', ''))}.{rng.choice(SUFFIXES)}"
        out[new] = out[name] if rng.random() < 0.5 else out.pop(name)
    elif luck < 0.7:
        out[name], out[other] = out[other], out[name]
    else:
        out.pop(name)
    return out


def retyped(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A tensor whose bytes are said to be of another shape or dtype that they fill as exactly."""
    name = rng.choice(list(header))
    match header[name]:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end < 2**40:
            pass
        case _:
            return header
    dtype, size = rng.choice((("F32", 4), ("F16", 2), ("I32", 4), ("U32", 4), ("U8", 1), ("I8", 1), ("I64", 8),
                              ("F8_E4M3", 1), ("BF16", 2), ("F64", 8), ("F8_E8M0", 1), ("BOOL", 1)))  # fmt: skip
    n = (end - begin) // size
    shapes = [[n], [1, n], [n, 1], [1, 1, n], [2, n // 2], [n // 2, 2], [4, n // 4], [32, n // 32], [64, n // 64],
              [n // 32, 32], [0, n], [n, 0], [], [1] * 70 + [n]]  # fmt: skip
    shape = rng.choice(shapes)
    volume = size
    for d in shape:
        volume *= d
    return {**header, name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + volume]}}


def restated(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """A text that a tensor holds (bitsandbytes' state), changed and put at the end of the file."""
    name = next((n for n in header if "quant_state" in n), None)
    match name and header[name]:
        case {"data_offsets": [int(begin), int(end)]} if name is not None and 0 <= begin <= end:
            pass
        case _:
            return header, data
    try:
        text = json.dumps(changed(rng, json.loads(data[begin:end]))).encode()
    except ValueError:
        return header, data
    where = {"dtype": "U8", "shape": [len(text)], "data_offsets": [len(data), len(data) + len(text)]}
    return {**header, name: where}, data + text


def mutate(rng: random.Random, whole: Victim, path: Path) -> Any:
    """Writes a damaged copy of the file to path; its config, damaged too or not."""
    header, data, config = whole.header, whole.data, whole.config
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        what = rng.random()
        if what < 0.02:
            config = rng.choice(ODD)
        elif what < 0.35:
            config = changed(rng, config)
        elif what < 0.5:
            header = changed(rng, header)
        elif what < 0.6 and isinstance(header, dict):
            header, data = restated(rng, header, data)
        elif what < 0.75 and isinstance(header, dict) and header:
            header = renamed(rng, header)
        elif what < 0.9 and isinstance(header, dict) and header:
            header = retyped(rng, header)
        else:
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 8, 200))):
                at = rng.randrange(len(damaged))
                damaged[at : at + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\0\0\x80\x7f", rng.randbytes(4))
                )
            data = bytes(damaged[: len(data)])
    text = json.dumps(header).encode()
    luck = rng.random()
    length = None
    if luck < 0.1:
        raw = bytearray(text)
        for _ in range(rng.choice((1, 3))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        text = bytes(raw)
    elif luck < 0.13:
        length = rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1))
    elif luck < 0.16:
        data = data[: rng.randrange(len(data))]
    elif luck < 0.18:
        text = b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(5000)) + b"}," + text[1:]
    elif luck < 0.19:
        text = b'{"a":' * rng.choice((300, 990, 100_000)) + text
    Victim.write_text(path, text, data, length)
    return config


def refused(read: Callable[[], object]) -> bool:
    """Whether reading ends in an InputError that fits a screen; any other error is the test's."""
    try:
        read()
        said = ""
    except InputError as e:
        said = str(e)
    assert len(said) < 1000
    return bool(said)


def readable(path: Path, config: Any) -> bool:
    """Whether all of a folder can be read. Each weight is tried, whatever the others are."""
    sources: list[Folder] = []
    names = {f"{n}.weight": f"{n}.weight" for n in ("a", "b", "norm")}
    if refused(lambda: sources.append(Folder(Shards([path]), names, config))):
        return False

    def read(name: str, shape: tuple[int, ...]) -> None:
        value = Checkpoint(sources[0]).floats(name, shape)
        assert value.shape == shape
        assert value.is_floating_point()
        sources[0].input(name)

    found = [refused(partial(read, n, s)) for n, s in zip(names, (SHAPE, SHAPE, (64,)), strict=True)]
    return not any(found)


@pytest.mark.parametrize("kind", VICTIMS)
def test_a_damaged_folder_is_refused_or_read(tmp_path, kind):
    path, whole = tmp_path / "model.safetensors", VICTIMS[kind]()
    whole.write(path)
    assert readable(path, whole.config)
    rng, read, slowest = random.Random(kind), 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        config = mutate(rng, whole, path)
        start = time.process_time()
        read += readable(path, config)
        slowest = max(slowest, time.process_time() - start)
    assert 0 < read < 200  # damage that is mostly seen, and not always
    assert slowest < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def opened(path: Path, whole: Victim, **config: Any) -> Checkpoint:
    whole.write(path)
    names = {f"{n}.weight": f"{n}.weight" for n in ("a", "b", "norm")}
    return Checkpoint(Folder(Shards([path]), names, {**whole.config, **config}))


@pytest.mark.parametrize("config", [[], "gptq", 4, ["gptq"], 0.5])
def test_a_config_that_is_no_object_is_refused(tmp_path, config):
    VICTIMS["gptq"]().write(tmp_path / "m")
    with pytest.raises(InputError, match="quantization_config should be an object"):
        Folder(Shards([tmp_path / "m"]), {}, config)


@pytest.mark.parametrize("method", [[], {"gptq": 1}, None, 4, "x" * 100_000])
def test_a_method_that_is_no_name_is_refused(tmp_path, method):
    with pytest.raises(InputError, match=r"weights quantized by .{,60} cannot be read"):
        opened(tmp_path / "m", VICTIMS["gptq"](), quant_method=method)


@pytest.mark.parametrize(
    "kind", sorted({*VICTIMS} - {"ct-int", "ct-mixed", "ct-fp4"})
)  # which name their weights in the config
def test_codes_in_place_of_a_vector_are_refused(tmp_path, kind):
    whole = VICTIMS[kind]()
    del whole.header["norm.weight"]
    whole.header |= {f"norm.{n[2:]}": e for n, e in whole.header.items() if n.startswith("b.")}
    whole.header = {n: e for n, e in whole.header.items() if not n.startswith("b.")}
    with pytest.raises(InputError, match=r"norm\.weight is codes on disk, which only matrices can be"):
        opened(tmp_path / "m", whole).floats("norm.weight", (64,))


@pytest.mark.parametrize("dtype", [63, 10**30, {}, "int8", "float8_e4m3fn"])
def test_a_config_with_a_dtype_that_is_none_of_floats_is_refused(tmp_path, dtype):
    path = folder(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    with pytest.raises(InputError, match="float32, bfloat16 or float16"):
        models.load(path)


def nested(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gptq", {"checkpoint_format": nested(900)}),
        ("awq", {"version": nested(900)}),
        ("mlx", {"bits": nested(900), "a": None, "b": None}),
        ("mlx", {"mode": nested(900), "a": None, "b": None}),
        ("ct-int", {"config_groups": {"0": {"targets": ["Linear"], "weights": nested(900)}}}),
        ("ct-int", {"config_groups": {"0": {"targets": ["Linear"], "weights": {"type": nested(900)}}}}),
    ],
)
def test_a_deep_value_is_not_written_out(tmp_path, kind, config):
    with pytest.raises(InputError, match=r"\[\[\["):
        opened(tmp_path / "m", VICTIMS[kind](), **config)
