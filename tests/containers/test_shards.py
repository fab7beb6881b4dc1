"""Safetensors files: written, read, and broken in every way."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from halfbyte.containers.shards import INDEX, Shards, read_json, sha256_of, write_shards
from halfbyte.errors import InputError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "c": torch.zeros(0, 7, dtype=torch.uint8),
    "d": torch.tensor([1, -2], dtype=torch.int64),
    "e": torch.tensor([1.0, -0.5]).to(torch.float8_e4m3fn),
    "f": torch.tensor([True, False]),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def file_of(path, header, data: bytes = b"", length: int | None = None):
    """A file with this header: an object, a text or bytes."""
    text = (
        header
        if isinstance(header, bytes)
        else header.encode()
        if isinstance(header, str)
        else json.dumps(header).encode()
    )
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_what_is_written_is_read(tmp_path):
    total = write_shards(tmp_path, TENSORS.items())
    assert total == sum(t.nbytes for t in TENSORS.values())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    shards = Shards.of_folder(tmp_path)
    assert set(shards) == set(TENSORS)
    theirs = load_file(tmp_path / "model.safetensors")
    for name, t in TENSORS.items():
        assert name in shards
        assert (shards.shape(name), shards.dtype(name)) == (tuple(t.shape), t.dtype)
        assert same(shards.get(name), t)
        assert same(theirs[name], t)
    assert "nothing" not in shards
    with pytest.raises(InputError, match="'nothing' is missing"):
        shards.get("nothing")


def test_what_is_read_is_memory_of_its_own(tmp_path):
    write_shards(tmp_path, TENSORS.items())
    shards = Shards.of_folder(tmp_path)
    shards.get("a.weight").zero_()
    assert same(shards.get("a.weight"), TENSORS["a.weight"])


def test_one_index_of_the_first_dimension_is_read_alone(tmp_path):
    stack, vector = torch.randn(3, 4, 5), torch.arange(3)
    save_file({"a": torch.zeros(7), "stack": stack, "vector": vector, "scalar": torch.tensor(1.0)}, tmp_path / "m")
    shards = Shards([tmp_path / "m"])
    assert all(torch.equal(shards.get("stack", i), stack[i]) for i in range(3))
    assert shards.get("vector", 2) == 2
    for name, at in (("stack", 3), ("scalar", 0)):
        with pytest.raises(InputError, match=name):
            shards.get(name, at)


def test_several_shards(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}
    total = write_shards(tmp_path, iter(tensors.items()), max_shard=1000)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert all((tmp_path / f).stat().st_size < 1300 for f in files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == total == 4000
    shards = Shards.of_folder(tmp_path)
    assert all(same(shards.get(n), t) for n, t in tensors.items())
    assert index["weight_map"].keys() == tensors.keys()


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    write_shards(tmp_path, [("a", torch.zeros(4)), ("b", torch.zeros(100)), ("c", torch.zeros(4))], max_shard=64)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_no_tensors_at_all(tmp_path):
    assert write_shards(tmp_path, []) == 0
    assert list(Shards.of_folder(tmp_path)) == []


def test_views_and_tensors_with_a_gradient_are_written(tmp_path):
    w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    write_shards(tmp_path, [("t", w.T)])
    assert torch.equal(Shards.of_folder(tmp_path).get("t"), w.detach().T)


def test_the_hash_is_of_the_contents(tmp_path):
    for name in ("x", "y", "z"):
        (tmp_path / name).write_bytes(b"other" if name == "z" else b"same")
    x, y, z = (sha256_of([tmp_path / n]) for n in "xyz")
    assert x == y != z
    assert len(x) == 64
    write_shards(tmp_path, TENSORS.items())
    shards = Shards.of_folder(tmp_path)
    assert shards.sha256() == sha256_of([tmp_path / "model.safetensors"])


# ---- files that come from anyone

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "not JSON": "{nothing",
    "not text": b"\xff\xfe\x00",
    "a list": [],
    "a number": 7,
    "null": "null",
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "huge number": "9" * 10_000,
    "entry is a list": {"a": []},
    "entry is a string": {"a": "F32"},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "unknown dtype": {"a": F32 | {"dtype": "F12"}},
    "dtype is a list": {"a": F32 | {"dtype": ["F32"]}},
    "wrong dtype": {"a": F32 | {"dtype": "F16"}},
    "shape is a number": {"a": F32 | {"shape": 2}},
    "shape is negative": {"a": F32 | {"shape": [-2]}},
    "two negatives": {"a": F32 | {"shape": [-1, -2]}},
    "shape of floats": {"a": F32 | {"shape": [2.0]}},
    "shape of booleans": {"a": F32 | {"shape": [True, 2]}},
    "shape of strings": {"a": F32 | {"shape": ["2"]}},
    "shape too large": {"a": F32 | {"shape": [10**18, 10**18]}},
    "offsets outside": {"a": F32 | {"data_offsets": [4, 12]}},
    "offsets far outside": {"a": F32 | {"data_offsets": [2**63, 2**63 + 8]}},
    "offsets negative": {"a": F32 | {"data_offsets": [-8, 0]}},
    "offsets turned": {"a": F32 | {"data_offsets": [8, 0]}},
    "one offset": {"a": F32 | {"data_offsets": [0]}},
    "three offsets": {"a": F32 | {"data_offsets": [0, 8, 8]}},
    "offsets of floats": {"a": F32 | {"data_offsets": [0.0, 8.0]}},
    "offsets null": {"a": F32 | {"data_offsets": None}},
    "size differs": {"a": F32 | {"shape": [1]}},
    "many empty dimensions": {"a": {"dtype": "F32", "shape": [0] * 100, "data_offsets": [0, 0]}},
    "many huge dimensions": {"a": F32 | {"shape": [2**62] * 50_000}},  # whose product would take seconds
    "empty but huge": {"a": {"dtype": "F32", "shape": [0, 2**63, 2**63], "data_offsets": [0, 0]}},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused(tmp_path, kind):
    file = file_of(tmp_path / "model.safetensors", HEADERS[kind], bytes(8))
    if kind == "many empty dimensions":  # odd, but nothing is wrong with it
        assert Shards([file]).get("a").shape == (0,) * 100
        return
    with pytest.raises(InputError, match=r"model\.safetensors"):
        Shards([file])


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**9, 200, 65])
def test_a_header_that_claims_to_be_longer_than_the_file(tmp_path, length):
    file = file_of(tmp_path / "m", {"a": F32}, bytes(8), length=length)
    with pytest.raises(InputError, match=r"truncated|not JSON"):
        Shards([file])


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_length(tmp_path, size):
    (tmp_path / "m").write_bytes(bytes(size))
    with pytest.raises(InputError, match=f"it has {size} bytes"):
        Shards([tmp_path / "m"])


def test_every_truncation_is_noticed(tmp_path):
    whole = save(TENSORS)
    for n in range(len(whole)):
        (tmp_path / "m").write_bytes(whole[:n])
        with pytest.raises(InputError):
            Shards([tmp_path / "m"])


@pytest.mark.parametrize("offsets", [[0, 8], [4, 12], [2, 10]])
def test_tensors_that_share_bytes_are_refused(tmp_path, offsets):
    """A file of a few bytes would else stand for any number of large weights."""
    file = file_of(tmp_path / "m", {"b": F32 | {"data_offsets": offsets}, "a": F32}, bytes(12))
    with pytest.raises(InputError, match=r"'(a|b)' and '(a|b)' share bytes"):
        Shards([file])


def test_tensors_that_touch_and_empty_ones_share_nothing(tmp_path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}
    header = {"a": F32, "e": empty, "b": F32 | {"data_offsets": [8, 16]}}
    assert list(Shards([file_of(tmp_path / "m", header, bytes(16))])) == ["a", "e", "b"]


def test_metadata_is_no_tensor(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "m", metadata={"format": "pt"})
    assert list(Shards([tmp_path / "m"])) == ["a"]


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "m")
    shards = Shards([tmp_path / "m"])
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-4])
    with pytest.raises(InputError, match="ends inside the tensor 'a'"):
        shards.get("a")


def test_a_name_in_two_files(tmp_path):
    for n in ("x", "y"):
        save_file({"a": torch.ones(1)}, tmp_path / n)
    with pytest.raises(InputError, match="'a' stands in x too"):
        Shards([tmp_path / "x", tmp_path / "y"])


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Shards([tmp_path / "nowhere.safetensors"])
    with pytest.raises(InputError, match="cannot be read"):
        Shards([tmp_path])
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        Shards.of_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "x.pth"])
def test_a_pickle_is_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(InputError, match="pickle"):
        Shards.of_folder(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b.safetensors", "..", ".", "", "sub/../x"])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"not a file name|cannot be read"):
        Shards.of_folder(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\x00"]
)
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError, match=INDEX.replace(".", r"\.")):
        Shards.of_folder(tmp_path)


def test_a_name_with_a_null_byte_is_refused(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x\0y"}}))
    with pytest.raises(InputError):
        Shards.of_folder(tmp_path)


def test_an_index_that_names_a_missing_shard(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(InputError, match=r"model-1\.safetensors cannot be read"):
        Shards.of_folder(tmp_path)


def test_json_files(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(InputError, match=r"x\.json is missing"):
        read_json(path)
    path.write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def read_or_refused(file) -> dict[str, torch.Tensor]:
    """All tensors, or none where the file is refused by an error that names it; any other error is the test's."""
    try:
        shards = Shards([file])
        return {name: shards.get(name) for name in shards}
    except InputError as e:
        if str(file) not in str(e):
            raise
        return {}


@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_safetensors_reads_it(tmp_path_factory, data):
    whole = bytearray(save(TENSORS))
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        # most of them in the header, where they matter
        at = data.draw(st.integers(0, (header if data.draw(st.booleans()) else len(whole)) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("damaged") / "m"
    file.write_bytes(bytes(whole))
    ours = read_or_refused(file)
    try:
        theirs = load(bytes(whole))
    except Exception:  # its errors are of several kinds; it refuses more than we do (holes)
        return
    assert ours.keys() == theirs.keys()
    assert all(same(ours[n], theirs[n]) for n in ours)


@given(st.binary(max_size=300))
def test_any_bytes(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("bytes") / "m"
    file.write_bytes(data)
    read_or_refused(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: (
        st.lists(v, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), v, max_size=4)
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BOOL"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | json_values,
    }
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3))
def test_any_json(tmp_path_factory, header):
    read_or_refused(file_of(tmp_path_factory.mktemp("json") / "m", json.dumps(header), bytes(16)))
