"""Importance matrices as llama.cpp writes them, for tests."""

import struct

import gguf
import numpy as np


def entries(squares, calls=7):
    """The older layout: sums over calls."""
    out = struct.pack("<i", len(squares))
    for name, s in squares.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(s))
        out += (s * calls).numpy().tobytes()
    return out + struct.pack("<ii", 3, 4) + b"text"


def as_gguf(path, squares, count=50.0, experts=1, counts=True):
    """By the gguf package's own writer."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_string("general.type", "imatrix")
    for name, s in squares.items():
        writer.add_tensor(f"{name}.in_sum2", np.tile((s * count).numpy(), (experts, 1)))
        if counts:
            writer.add_tensor(f"{name}.counts", np.full((experts, 1), count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
