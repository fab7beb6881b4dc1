"""GGUF files: written, read, held against the gguf package, and broken in every way."""

import io
import struct
import time
import tracemalloc

import gguf as package
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.containers import ggml, gguf
from halfbyte.errors import InputError
from halfbyte.qtensor import QTensor

ARCHITECTURE = {"general.architecture": "llama"}
FOREIGN = sorted(t.name.lower() for t in quants._type_traits if t.name.lower() not in gguf.TYPES)  # only dequantized


def of_type(kind: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor | QTensor:
    """Random numbers, stored as one of TYPES."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return w.to(gguf.FLOATS[kind]) if kind in gguf.FLOATS else kernels.quantize(w, kind)


def same(a: torch.Tensor | QTensor, b: torch.Tensor | QTensor) -> bool:
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        parts, others = a.tensors(), b.tensors()
        equal = parts.keys() == others.keys() and all(same(parts[k], others[k]) for k in parts)
        return equal and (a.format, a.shape, a.dtype) == (b.format, b.shape, b.dtype)
    if isinstance(a, QTensor) or isinstance(b, QTensor):
        return False
    flat = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def plain(metadata) -> str:
    """Metadata as they are compared: arrays as lists, and 1 is not True."""
    return repr({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in metadata.items()})


def fields(reader: package.GGUFReader) -> str:
    """The same of the package's reader."""
    return repr({k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")})


def write(path, tensors, metadata=None):
    heads = {n: (gguf.kind_of(t), tuple(t.shape)) for n, t in tensors.items()}
    gguf.write(path, ARCHITECTURE | (metadata or {}), heads, iter(tensors.items()))
    return path


def foreign(path, tensors, *keys, alignment: int | None = None, endianess=package.GGUFEndian.LITTLE):
    """A file that the package writes. tensors: name -> numbers, or a type and its blocks; keys: arguments of its
    add_key_value."""
    writer = package.GGUFWriter(path, "llama", endianess=endianess)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key in keys:
        writer.add_key_value(*key)
    for name, data in tensors.items():
        kind, data = data if isinstance(data, tuple) else (None, data)
        writer.add_tensor(name, data, raw_dtype=kind and package.GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks_of(kind: str, rows: int, seed: int = 0) -> np.ndarray:
    """Random bytes: two blocks a row."""
    _, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind.upper()]]
    return np.random.default_rng(seed).integers(0, 256, (rows, 2 * size), dtype=np.uint8)


# ---- what is written is read

texts = st.text(max_size=8)
ints, floats = st.integers(-(2**31), 2**31 - 1), st.floats(allow_nan=False, width=32)
values = (
    texts | st.booleans() | st.integers(-(2**31), 2**32 - 1) | floats
    | st.one_of(*(st.lists(v, min_size=1, max_size=4) for v in (texts, st.booleans(), ints, floats)))
)  # fmt: skip
metadatas = st.dictionaries(texts.filter(lambda k: k not in (*ARCHITECTURE, "general.alignment")), values, max_size=5)


@st.composite
def stored(draw) -> torch.Tensor | QTensor:
    kind = draw(st.sampled_from(gguf.TYPES))
    least = ggml.BLOCKS[kind].numbers if kind in ggml.BLOCKS else 1
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), least * draw(st.integers(1, 3)))
    return of_type(kind, shape, draw(st.integers(0, 2**32)))


tensor_dicts = st.dictionaries(st.text(min_size=1, max_size=8), stored(), max_size=4)


@given(metadatas, tensor_dicts)
def test_what_is_written_is_read(tmp_path_factory, metadata, tensors):
    file = gguf.File(write(tmp_path_factory.mktemp("written") / "m.gguf", tensors, metadata))
    assert plain(file.metadata) == repr(ARCHITECTURE | metadata)
    assert list(file) == list(tensors)
    for name, t in tensors.items():
        assert same(file.get(name, torch.float32), t), name
        assert (file.infos[name].type, file.infos[name].shape) == (gguf.kind_of(t), tuple(t.shape))


@given(metadatas, tensor_dicts)
def test_the_package_reads_the_same(tmp_path_factory, metadata, tensors):
    path = write(tmp_path_factory.mktemp("written") / "m.gguf", tensors, metadata)
    theirs, ours = package.GGUFReader(path), gguf.File(path)
    assert fields(theirs) == repr(ARCHITECTURE | metadata)
    assert [t.name for t in theirs.tensors] == list(tensors)
    for t in theirs.tensors:
        held = tensors[t.name]
        assert t.shape[::-1].tolist() == list(held.shape)
        assert t.data.tobytes() == ours.bytes(t.name).numpy().tobytes()
        values = torch.from_numpy(quants.dequantize(t.data.copy(), t.tensor_type))
        assert torch.equal(values, held.dequantize() if isinstance(held, QTensor) else held.float())


@pytest.mark.parametrize("kind", gguf.TYPES)
@pytest.mark.parametrize("shape", [(512,), (3, 256), (2, 3, 256)])
def test_every_type_and_number_of_dimensions(tmp_path, kind, shape):
    t = of_type(kind, shape)
    file = gguf.File(write(tmp_path / "m.gguf", {"before": torch.ones(1), "t": t, "after": torch.ones(1)}))
    assert same(file.get("t", torch.float32), t)
    assert file.bytes("t").nbytes == file.infos["t"].nbytes == t.nbytes
    assert file.get("after", torch.float32) == 1


def test_the_dtype_asked_for_is_that_of_the_source_of_codes_only(tmp_path):
    q = kernels.quantize(torch.randn(2, 32).bfloat16(), "q4_0")
    file = gguf.File(write(tmp_path / "m.gguf", {"q": q, "f": torch.ones(3)}))
    assert same(file.get("q", torch.bfloat16), q)
    assert file.get("f", torch.bfloat16).dtype == torch.float32


def test_views_and_tensors_with_a_gradient_are_written(tmp_path):
    w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    assert same(gguf.File(write(tmp_path / "m.gguf", {"t": w.T})).get("t", torch.float32), w.detach().T)


def test_what_is_read_is_memory_of_its_own(tmp_path):
    file = gguf.File(write(tmp_path / "m.gguf", {"a": torch.ones(3)}))
    file.get("a", torch.float32).zero_()
    assert torch.equal(file.get("a", torch.float32), torch.ones(3))


def test_no_tensors_at_all(tmp_path):
    assert list(gguf.File(write(tmp_path / "m.gguf", {}))) == []


def test_an_alignment_in_the_metadata_is_kept_to(tmp_path):
    tensors = {n: torch.full((3,), float(i)) for i, n in enumerate("abc")}
    path = write(tmp_path / "m.gguf", tensors, {"general.alignment": 64})
    ours, theirs = gguf.File(path), {t.name: t.data for t in package.GGUFReader(path).tensors}
    for n, t in tensors.items():
        assert ours.infos[n].offset % 64 == 0
        assert same(ours.get(n, torch.float32), t)
        assert theirs[n].tolist() == t.tolist()


def test_what_no_type_holds_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"no type for torch\.int32"):
        gguf.kind_of(torch.ones(3, dtype=torch.int32))
    with pytest.raises(InputError, match="no block for int4-g32"):
        gguf.kind_of(kernels.quantize(torch.randn(2, 32), "int4-g32"))
    with pytest.raises(InputError, match="t: rows of 40 are no whole blocks of q4_0"):
        gguf.write(tmp_path / "m.gguf", ARCHITECTURE, {"t": ("q4_0", (2, 40))}, iter([]))


def test_tensors_in_another_order_are_a_mistake(tmp_path):
    heads = dict.fromkeys("ab", ("f32", (3,)))
    with pytest.raises(AssertionError, match="b"):
        gguf.write(tmp_path / "m.gguf", ARCHITECTURE, heads, ((n, torch.ones(3)) for n in "ba"))


def test_texts_of_the_metadata(tmp_path):
    file = gguf.File(write(tmp_path / "m.gguf", {}, {"a": "ä", "empty": "", "n": 1}))
    assert (file.text("a"), file.text("empty", "x"), file.text("none", "x")) == ("ä", "", "x")
    for key in ("none", "n"):
        with pytest.raises(InputError, match=rf"m\.gguf: its metadata lacks the text {key}"):
            file.text(key)


# ---- what the package writes is read

T = package.GGUFValueType
EXTREMES = {
    T.UINT8: [0, 2**8 - 1], T.INT8: [-(2**7), 2**7 - 1], T.UINT16: [0, 2**16 - 1], T.INT16: [-(2**15), 2**15 - 1],
    T.UINT32: [0, 2**32 - 1], T.INT32: [-(2**31), 2**31 - 1], T.UINT64: [0, 2**64 - 1], T.INT64: [-(2**63), 2**63 - 1],
    T.FLOAT32: [-0.0, float("inf")], T.FLOAT64: [1e300, 5e-324], T.BOOL: [False, True], T.STRING: ["", "ä\0"],
}  # fmt: skip


@pytest.mark.parametrize("kind", EXTREMES)
def test_values_of_every_kind(tmp_path, kind):
    least, most = both = EXTREMES[kind]
    path = foreign(tmp_path / "m.gguf", {}, ("a", least, kind), ("b", most, kind), ("c", both, T.ARRAY, kind))
    assert plain(gguf.File(path).metadata) == repr(ARCHITECTURE | {"a": least, "b": most, "c": both})
    assert plain(gguf.File(path).metadata) == fields(package.GGUFReader(path))


@pytest.mark.parametrize("kind", FOREIGN)
def test_types_that_are_only_dequantized(tmp_path, kind):
    data = blocks_of(kind, 6)
    path = foreign(tmp_path / "m.gguf", {"before": np.ones(3, np.float32), "t": (kind, data.reshape(2, 3, -1))})
    read = gguf.File(path).get("t", torch.bfloat16)
    with np.errstate(all="ignore"):  # random bytes have infinite scales too
        values = torch.from_numpy(quants.dequantize(data, package.GGMLQuantizationType[kind.upper()]))
    assert isinstance(read, torch.Tensor)
    assert read.shape[:2] == (2, 3)
    assert same(read.flatten(0, 1), values)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_ternary_numbers_are_read_exactly(tmp_path, kind):
    w = np.random.default_rng(0).integers(-1, 2, (3, 512)).astype(np.float32)
    data = quants.quantize(w, package.GGMLQuantizationType[kind.upper()])
    read = gguf.File(foreign(tmp_path / "m.gguf", {"t": (kind, data)})).get("t", torch.float32)
    assert same(read, torch.from_numpy(w))


TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(5, np.float16),
    "c": ("q8_0", quants.quantize(np.arange(64, dtype=np.float32)[None], package.GGMLQuantizationType.Q8_0)),
    "d": np.full((1, 1, 2), -1, np.float32),
}


def check_tensors(file: gguf.File) -> None:
    assert list(file) == list(TENSORS)
    assert [file.infos[n].shape for n in file] == [(2, 3), (5,), (1, 64), (1, 1, 2)]
    for n, t in TENSORS.items():
        assert file.bytes(n).numpy().tobytes() == (t[1] if isinstance(t, tuple) else t).tobytes()


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_alignments(tmp_path, alignment):
    file = gguf.File(foreign(tmp_path / "m.gguf", TENSORS, alignment=alignment))
    check_tensors(file)
    assert all(file.infos[n].offset % (alignment or 32) == 0 for n in file)
    assert file.metadata.get("general.alignment") == alignment


def test_version_2(tmp_path):
    path = foreign(tmp_path / "m.gguf", TENSORS, ("k", ["a", "b"], T.ARRAY))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 3), struct.pack("<I", 2), 1))
    check_tensors(gguf.File(path))
    assert gguf.File(path).metadata["k"] == ["a", "b"]


def test_a_big_endian_file_is_refused(tmp_path):
    path = foreign(tmp_path / "m.gguf", TENSORS, endianess=package.GGUFEndian.BIG)
    with pytest.raises(InputError, match=r"m\.gguf .* big-endian"):
        gguf.File(path)


# ---- files that come from anyone

U8, U32, STRING, ARRAY, U64 = 0, 4, 8, 9, 10  # GGUF's numbers of value types
F32, Q4_0, I8, TQ2_0 = 0, 2, 24, 35  # ggml's of tensor types


def text(s: str | bytes, n: int | None = None) -> bytes:
    """n: the length that it claims."""
    data = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(data) if n is None else n) + data


def key(kind: int, value: bytes, name: str | bytes = "k") -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, n: int, data: bytes = b"", name: str = "k") -> bytes:
    return key(ARRAY, struct.pack("<IQ", kind, n) + data, name)


def tensor(*dims: int, kind: int = F32, offset: int = 0, name: str | bytes = "t", n: int | None = None) -> bytes:
    """dims: the innermost first, as they stand in a file. n: how many it says they are."""
    count = len(dims) if n is None else n
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def built(
    *parts: bytes, keys: int = 0, tensors: int = 0, data: bytes = b"", version: int = 3, magic: bytes = b"GGUF",
    alignment: int = 32,
) -> bytes:  # fmt: skip
    """A file whose head is these parts, and says that they are so many keys and tensors."""
    head = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % alignment) + data


def aligned(kind: int, value: bytes) -> bytes:
    return built(key(kind, value, "general.alignment"), keys=1)


def one(*dims: int, nbytes: int = 128, **how) -> bytes:
    """A file of one tensor and so many bytes."""
    return built(tensor(*dims, **how), tensors=1, data=bytes(nbytes))


def two(offset: int, **how) -> bytes:
    """A file of two tensors of 64 bytes each."""
    return built(tensor(16), tensor(16, **({"name": "u", "offset": offset} | how)), tensors=2, data=bytes(128))


MANY = 1 << 19  # texts: half of what all may be
HOSTILE = {
    "empty": (b"", "it has 0 bytes"),
    "nothing but the magic": (b"GGUF", "it has 4 bytes"),
    "a byte too short": (built()[:23], "it has 23 bytes"),
    "no GGUF": (built(magic=b"GGML"), "does not begin with GGUF"),
    "magic of the other byte order": (built(magic=b"FUGG"), "does not begin with GGUF"),
    "version 0": (built(version=0), "version is 0"),
    "version 1": (built(version=1), "version is 1"),
    "version 4": (built(version=4), "version is 4"),
    "big-endian": (built(version=3 << 24), "big-endian"),
    "big-endian, version 2": (built(version=2 << 24), "big-endian"),
    "2^32 keys": (built(keys=2**32), "truncated.*metadata keys"),
    "2^63 keys": (built(keys=2**63), "truncated.*metadata keys"),
    "2^64 - 1 keys": (built(keys=2**64 - 1), "truncated.*metadata keys"),
    "a key that is not there": (built(keys=1), "truncated.*metadata keys"),
    "2^32 tensors": (built(tensors=2**32), "truncated.*tensors"),
    "2^63 tensors": (built(tensors=2**63), "truncated.*tensors"),
    "a tensor that is not there": (built(tensors=1), "truncated.*tensors"),
    "a tensor more": (built(tensor(32), tensors=2), "truncated|dimensions"),
    "text of 2^63 bytes": (built(key(STRING, text("abc", 2**63)), keys=1), "truncated.*'k'"),
    "text of 2^64 - 1 bytes": (built(key(STRING, text("abc", 2**64 - 1)), keys=1), "truncated.*'k'"),
    "text that ends a byte after": (built(key(STRING, text(bytes(19), 20)), keys=1), "truncated: 20 x 1 .*'k'"),
    "text without a length": (built(key(STRING, b""), keys=1)[:40], "ends inside its head"),
    "text not UTF-8": (built(key(STRING, text(b"a\xff")), keys=1), "'k' is no text in UTF-8"),
    "text half a letter": (built(key(STRING, text("ä".encode()[:1])), keys=1), "'k' is no text in UTF-8"),
    "text a surrogate": (built(key(STRING, text(b"\xed\xa0\x80")), keys=1), "'k' is no text in UTF-8"),
    "key of 2^63 bytes": (built(text("k", 2**63), bytes(64), keys=1), "truncated.*a metadata key"),
    "key of 65537 bytes": (built(key(U8, b"\0", "k" * (2**16 + 1)), keys=1), "a metadata key' has 65537 bytes"),
    "key not UTF-8": (built(key(U8, b"\0", b"\xff"), keys=1), "a metadata key' is no text"),
    "key twice": (built(key(U8, b"\1"), key(U8, b"\1"), keys=2), "key 'k' stands in it twice"),
    "number cut off": (built(key(U64, bytes(2)), keys=1)[:39], "ends inside its head"),
    "value of type 13": (built(key(13, bytes(64)), keys=1), "'k' is of type 13"),
    "value of type 2^32 - 1": (built(key(2**32 - 1, bytes(64)), keys=1), "'k' is of type 4294967295"),
    "array of arrays": (built(array(ARRAY, 1, struct.pack("<IQ", U8, 1) + b"\0"), keys=1), "'k' is an array of type 9"),
    "array of type 13": (built(array(13, 1, bytes(64)), keys=1), "'k' is an array of type 13"),
    "array of 2^61 u64": (built(array(U64, 2**61, bytes(64)), keys=1), "truncated.*'k'"),
    "array of 2^64 - 1 u8": (built(array(U8, 2**64 - 1, bytes(64)), keys=1), "truncated.*'k'"),
    "array that ends a byte after": (built(array(U8, 24, bytes(23)), keys=1)[:72], "truncated: 24 x 1 .*'k'"),
    "array of 2^40 texts": (built(array(STRING, 2**40, bytes(64)), keys=1), "truncated.*'k'"),
    "array of 2^61 texts": (built(array(STRING, 2**61, bytes(64)), keys=1), "truncated.*'k'"),
    "array of too few texts": (built(array(STRING, 2, text("abcdefgh" * 2)), keys=1)[:73], "ends inside its head"),
    "array with a text too long": (built(array(STRING, 1, text("a", 99)), keys=1), "truncated: 99 x 1.*'k'"),
    "2^20 + 1 texts": (built(array(STRING, 2 * MANY + 1, bytes(16 * MANY + 8)), keys=1), "more than 1048576 texts"),
    "2^20 + 1 texts in two arrays": (
        built(
            array(STRING, MANY, bytes(8 * MANY)),
            array(STRING, MANY + 1, bytes(8 * MANY + 8), "l"),
            keys=2,
        ),
        "more than 1048576 texts",
    ),
    "alignment 0": (aligned(U32, struct.pack("<I", 0)), "general.alignment is 0"),
    "alignment 1": (aligned(U32, struct.pack("<I", 1)), "general.alignment is 1"),
    "alignment 3": (aligned(U32, struct.pack("<I", 3)), "general.alignment is 3"),
    "alignment 48": (aligned(U32, struct.pack("<I", 48)), "general.alignment is 48"),
    "alignment 2^31": (aligned(U32, struct.pack("<I", 2**31)), "general.alignment is 2147483648"),
    "alignment -32": (aligned(5, struct.pack("<i", -32)), "general.alignment is -32"),
    "alignment 32.0": (aligned(6, struct.pack("<f", 32)), "general.alignment is 32.0"),
    "alignment yes": (aligned(7, b"\1"), "general.alignment is True"),
    "alignment a text": (aligned(STRING, text("32")), "general.alignment is 32,"),
    "alignment an array": (aligned(ARRAY, struct.pack("<IQI", U32, 1, 32)), r"general.alignment is \[32\]"),
    "alignment an empty array": (aligned(ARRAY, struct.pack("<IQ", U32, 0)), r"general.alignment is \[\]"),
    "no dimensions": (one(), "'t' has 0 dimensions"),
    "5 dimensions": (one(1, 1, 1, 1, 1), "'t' has 5 dimensions"),
    "2^32 - 1 dimensions": (one(1, n=2**32 - 1), "'t' has 4294967295 dimensions"),
    "a dimension of 0": (one(32, 0), r"'t' has the shape \(0, 32\)"),
    "a row of 0": (one(0), r"'t' has the shape \(0,\)"),
    "0 times much": (one(2**63, 0, 2**63), "'t' has the shape"),
    "2^64 numbers": (one(2**32, 2**32), "'t' has the shape"),
    "2^64 numbers in four dimensions": (one(*[2**16] * 4), "'t' has the shape"),
    "2^64 + 32 numbers": (one(32, 2**59 + 1), "'t' has the shape"),  # 32 of them, to who counts in 64 bits
    "2^62 numbers": (one(2**62), "'t' has the shape"),  # no bytes of float32, to who counts in 64 bits
    "2^255 numbers": (one(2**63, 2**63, 2**63, 2**63), "'t' has the shape"),
    "2^40 numbers": (one(2**40), "truncated: the tensor 't'"),
    "2^40 rows": (one(1, 2**40), "truncated: the tensor 't'"),
    "rows of a part of a block": (one(48, kind=Q4_0), "'t': rows of 48 are no whole blocks of q4_0"),
    "rows of half a block": (one(16, 2, kind=Q4_0), "'t': rows of 16 are no whole blocks of q4_0"),
    "rows of half a super-block": (one(128, 2, kind=TQ2_0), "'t': rows of 128 are no whole blocks of tq2_0"),
    "type 4, which was dropped": (one(32, kind=4), "'t' is of type 4,"),
    "type 2^32 - 1": (one(32, kind=2**32 - 1), "'t' is of type 4294967295,"),
    "whole numbers": (one(32, kind=I8), "'t' is of type 24,"),
    "offset not aligned": (one(16, offset=16), "'t' is not aligned to 32"),
    "offset 1": (one(16, offset=1), "'t' is not aligned to 32"),
    "offset at the end": (one(16, offset=128), "truncated: the tensor 't'"),
    "offset after the end": (one(16, offset=2**20), "truncated: the tensor 't'"),
    "offset 2^63": (one(16, offset=2**63), "truncated: the tensor 't'"),
    "offset 2^64 - 32": (one(16, offset=2**64 - 32), "truncated: the tensor 't'"),
    "the same bytes": (two(0), "'u' overlaps another"),
    "some of the same bytes": (two(32), "'u' overlaps another"),
    "a byte too few": (one(32, nbytes=127), "truncated: the tensor 't'"),
    "no data": (one(32, nbytes=0), "truncated: the tensor 't'"),
    "name twice": (two(64, name="t"), "'t' stands in it twice"),
    "name not UTF-8": (one(32, name=b"\xff"), "a tensor's name\" is no text"),
    "name of 1025 bytes": (one(32, name="t" * 1025), "a tensor's name\" has 1025 bytes"),
    "name of 2^63 bytes": (built(text("t", 2**63), bytes(64), tensors=1), "truncated.*a tensor's name"),
}


VALID = {
    "nothing": built(),
    "a tensor": one(32),
    "four dimensions": one(2, 2, 2, 4),
    "codes": one(64, 2, kind=Q4_0),
    "an offset": one(16, offset=64),
    "two tensors": two(64),
    "two tensors, the second first": built(
        tensor(16, offset=64), tensor(16, name="u"), tensors=2, data=bytes(128)
    ),
    "a text up to the end": built(key(STRING, text(bytes(19))), keys=1),
    "an array up to the end": built(array(U8, 15, bytes(15)), keys=1),
    "empty arrays": built(array(U8, 0), array(STRING, 0, name="l"), keys=2),
    "an alignment in 64 bits": aligned(U64, struct.pack("<Q", 32)),
    "a key of 65536 bytes": built(key(U8, b"\0", "k" * 2**16), keys=1),
    "a key without letters": built(key(U8, b"\0", ""), keys=1),
    "a name of 1024 bytes": one(32, name="t" * 1024),
    "2^20 texts": built(array(STRING, 2 * MANY, bytes(16 * MANY)), keys=1),
}  # fmt: skip


@pytest.mark.parametrize("kind", VALID)
def test_a_file_at_the_bounds_is_read(tmp_path, kind):
    """What is refused below is refused for what is wrong with it."""
    (tmp_path / "m.gguf").write_bytes(VALID[kind])
    file = gguf.File(tmp_path / "m.gguf")
    assert all(file.get(n, torch.float32).shape == file.infos[n].shape for n in file)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, kind):
    data, said = HOSTILE[kind]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError, match=rf"(?s)m\.gguf.*{said}"):
        gguf.File(tmp_path / "m.gguf")


def test_a_hostile_file_costs_little(tmp_path):
    """Less than 50 MB and a second, for every one."""
    for i, (kind, (data, _)) in enumerate(HOSTILE.items()):
        (tmp_path / f"{i}.gguf").write_bytes(data)
        begin = time.process_time()  # not of the clock, which other processes slow down
        with pytest.raises(InputError):
            gguf.File(tmp_path / f"{i}.gguf")
        assert time.process_time() - begin < 1, kind
    tracemalloc.start()
    try:
        for i, kind in enumerate(HOSTILE):
            tracemalloc.reset_peak()
            with pytest.raises(InputError):
                gguf.File(tmp_path / f"{i}.gguf")
            assert tracemalloc.get_traced_memory()[1] < 50e6, kind
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (array(U8, 2**27 + 1), "larger than 134217728 bytes"),
        (array(U64, 2**24 + 1), "larger than 134217728 bytes"),
        (array(STRING, 2**24 + 1), "larger than 134217728 bytes"),
        (key(STRING, struct.pack("<Q", 2**24 + 1)), "'k' has 16777217 bytes"),
        (key(STRING, struct.pack("<Q", 2**35)), "larger than 134217728 bytes"),
    ],
    ids=["u8", "u64", "texts", "a text", "a long text"],
)
def test_what_a_large_file_claims_is_not_read_either(tmp_path, head, said):
    """Files of zeros that take no room on disk: as long as they claim to be, and more than any metadata are."""
    path = tmp_path / "m.gguf"
    with open(path, "wb") as f:
        f.write(built(head, keys=1))
        f.truncate(2**36)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"m\.gguf.*{said}"):
            gguf.File(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_metadata_are_not_too_large_together(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(built(array(U8, 90, bytes(90)), array(U8, 90, bytes(90), "l"), keys=2))
    assert list(gguf.File(path).metadata) == ["k", "l"]
    monkeypatch.setattr(gguf, "_MOST_METADATA", 100)
    with pytest.raises(InputError, match=r"m\.gguf.*larger than 100 bytes"):
        gguf.File(path)


def test_missing_files(tmp_path):
    for path in (tmp_path / "nowhere.gguf", tmp_path):
        with pytest.raises(InputError, match=rf"{path.name} cannot be read"):
            gguf.File(path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = write(tmp_path / "m.gguf", {"a": torch.ones(8)})
    file = gguf.File(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"m\.gguf: it ends inside the tensor 'a'"):
        file.get("a", torch.float32)


def test_a_tensor_that_comes_in_pieces_is_read_on(tmp_path, monkeypatch):
    """A read of Linux ends after 2 GiB. Here one ends after 7 bytes."""

    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer).cast("B")[:7])

    def slow(path, mode, buffering=-1):
        raw = Slow(path, "r")
        return io.BufferedReader(raw) if buffering else raw

    t = torch.arange(100.0)
    file = gguf.File(write(tmp_path / "m.gguf", {"before": t, "t": t}))
    monkeypatch.setattr(gguf, "open", slow, raising=False)
    assert same(file.get("t", torch.float32), t)


# A bit of everything, and where its head and its last tensor end.
_HEAD = (
    key(STRING, text("llama"), "general.architecture"), key(U32, struct.pack("<I", 64), "general.alignment"),
    key(7, b"\1", "b"), key(6, struct.pack("<f", 1.5), "f"), key(12, struct.pack("<d", 1.5), "d"),
    array(STRING, 3, text("a") + text("") + text("ä"), "s"), array(5, 2, struct.pack("<2i", -1, 1), "i"),
    tensor(3, 2), tensor(32, 2, kind=Q4_0, offset=64, name="q"), tensor(256, kind=TQ2_0, offset=128, name="x"),
)  # fmt: skip
HEAD = 24 + sum(map(len, _HEAD))
WHOLE = built(*_HEAD, keys=7, tensors=3, alignment=64, data=np.random.default_rng(0).bytes(256))
END = len(WHOLE) - 256 + 128 + 66


def check_against_the_package(file: gguf.File) -> None:
    """What the package reads of the file is what we read; it refuses more (an alignment of 64 bits)."""
    try:
        theirs = package.GGUFReader(file.path)
    except Exception:  # its errors are of several kinds
        return
    assert plain(file.metadata) == fields(theirs)
    assert {t.name: t.data.tobytes() for t in theirs.tensors} == {n: file.bytes(n).numpy().tobytes() for n in file}


def read_or_refused(path, data: bytes) -> bool:
    """Whether a file of these bytes can be read, all of it, as the package reads it. If not, then by an error that
    names it; any other error is the test's."""
    path.write_bytes(data)
    try:
        file = gguf.File(path)
        for name, info in file.infos.items():
            assert file.get(name, torch.float32).shape == info.shape
    except InputError as e:
        if str(path) not in str(e):
            raise
        return False
    check_against_the_package(file)
    return True


def test_every_truncation_is_noticed(tmp_path):
    """Padding after the last tensor may be missing."""
    assert [read_or_refused(tmp_path / "m.gguf", WHOLE[:n]) for n in range(len(WHOLE) + 1)] == [
        n >= END for n in range(len(WHOLE) + 1)
    ]


u64s = st.integers(0, 300) | st.sampled_from([(2**i + j) % 2**64 for i in range(65) for j in (-1, 0, 1)])
damages = st.one_of(
    st.binary(min_size=1, max_size=1),
    u64s.map(lambda n: struct.pack("<I", n % 2**32)),
    u64s.map(lambda n: struct.pack("<Q", n)),
    st.binary(max_size=20),
)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, HEAD - 1), damages, st.booleans()), min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_read_as_the_package_reads_it(tmp_path_factory, damage):
    """Bytes of the head written over, or put in between."""
    data = WHOLE
    for at, new, between in damage:
        data = data[:at] + new + data[at + (0 if between else len(new)) :]
    read_or_refused(tmp_path_factory.getbasetemp() / "damaged.gguf", data)


names = st.text(max_size=3) | st.binary(max_size=3)
parts = st.one_of(
    st.builds(key, st.integers(0, 13), st.binary(max_size=9), names),
    st.builds(lambda value, name: key(STRING, value, name), st.builds(text, names, st.none() | u64s), names),
    st.builds(array, st.integers(0, 13), u64s, st.binary(max_size=30), st.text(max_size=3)),
    st.builds(
        lambda dims, kind, offset, name: tensor(*dims, kind=kind, offset=offset, name=name),
        st.lists(st.sampled_from([1, 2, 32, 64, 256]) | u64s, max_size=5),
        st.integers(0, 42), st.sampled_from([0, 32, 64, 128]) | u64s, names,
    ),
)  # fmt: skip


@settings(max_examples=200)
@given(st.lists(parts, max_size=3), st.integers(0, 3), st.integers(0, 3), st.binary(max_size=400))
def test_any_parts(tmp_path_factory, parts, keys, tensors, data):
    read_or_refused(tmp_path_factory.getbasetemp() / "parts.gguf", built(*parts, keys=keys, tensors=tensors, data=data))


@given(st.binary(max_size=300))
def test_any_bytes(tmp_path_factory, data):
    read_or_refused(tmp_path_factory.getbasetemp() / "bytes.gguf", b"GGUF" + struct.pack("<I", 3) + data)
