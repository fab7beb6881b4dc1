"""Products with codes, on every instruction set of this machine, against float64; and the layout that they need."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.kernels import cpu, products
from halfbyte.layers import Codes, Linear, swap
from halfbyte.qtensor import QTensor

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason="the C++ kernels were not built")

FORMATS = [
    "int4-g128", "int4-g32", "uint4-g32", "int4-channel", "nf4-g64", "nf4-g64-dq", "fp4-bnb-g64", "q4_0", "q4_1",
    "q4_k", "nvfp4", "mxfp4", "int8-channel", "int8-g128", "uint8-g64", "q8_0",
]  # fmt: skip
INTEGERS = [
    "int4-g128", "int4-g32", "uint4-g32", "int4-channel", "q4_0", "q4_1", "q4_k", "int8-channel", "uint8-g64",
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=cpu.isas()[:-1])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.using(request.param):
        yield request.param


def quantized(shape: tuple[int, int], format: str, dtype: torch.dtype = torch.bfloat16) -> QTensor:
    w = (torch.randn(shape) * 0.02).to(dtype)
    return kernels.quantize(w, format, kernels.qparams(w, format, "minmax"))


def exact(q: QTensor) -> Tensor:
    """What the parts stand for, unrounded."""
    return replace(q.canonical(), dtype=torch.float32).dequantize().double()


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def allowed(reference: float, dtype: torch.dtype) -> float:
    """Twice what torch's own product of the dequantized weight loses. Of a few outputs that may be luckily little: at
    least the rounding of the output, or of some additions."""
    eps = torch.finfo(dtype).eps
    return 2 * max(reference, eps if dtype == torch.float32 else eps / 4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(72, 768), (33, 1280), (15, 512)])
def test_products_are_as_exact_as_the_reference(isa: str, format: str, shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        q = quantized(shape, format, dtype)
        value, dense = exact(q), q.dequantize()
        for rows in (1, 2, 3, 4, 8, 11, 17, 70):
            x, dy = torch.randn(rows, shape[1]).to(dtype), torch.randn(rows, shape[0]).to(dtype)
            bias = torch.randn(shape[0]).to(dtype)
            y, want = kernels.linear(x, q, bias), x.double() @ value.T + bias.double()
            assert y.dtype == dtype
            assert error(y, want) <= allowed(error(torch.nn.functional.linear(x, dense, bias), want), dtype), (
                dtype,
                rows,
            )
            dx, want = kernels.linear_grad(dy, q), dy.double() @ value
            assert dx.shape == (rows, shape[1])
            assert error(dx, want) <= allowed(error(dy @ dense, want), dtype), (dtype, rows)
        assert q.layout == "tiled"


@pytest.mark.parametrize("format", ["int4-g128", "int4-channel", "uint4-g32", "nf4-g64", "q4_k", "int8-channel"])
@pytest.mark.parametrize("outlier", [1e3, 1e5, 1e-34])
def test_outliers_among_inputs_cost_no_more_than_the_reference_loses(isa: str, format: str, outlier: float) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        q = quantized((72, 768), format, dtype)
        x = torch.randn(4, 768).to(dtype)
        x[:, 5], x[:, 400] = outlier, -outlier
        x[1, 256:] *= 1e-6  # blocks of their own size
        want, dense = x.double() @ exact(q).T, q.dequantize()
        assert error(kernels.linear(x, q), want) <= allowed(error(x @ dense.T, want), dtype)


def test_inputs_that_are_not_finite_give_what_the_reference_gives(isa: str) -> None:
    q = quantized((24, 256), "int4-g32")
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 256).bfloat16()
        x[1, 7] = bad
        y, want = kernels.linear(x, q), x @ q.dequantize().T
        assert torch.equal(y.isfinite(), want.isfinite())
        assert torch.equal(y.isnan(), want.isnan())


@pytest.mark.parametrize("format", FORMATS)
def test_the_layout_is_taken_back_byte_for_byte(isa: str, format: str) -> None:
    for shape in ((40, 768), (3, 256)):
        q = quantized(shape, format)
        before, codes, dense = {k: t.clone() for k, t in q.tensors().items()}, q.codes.clone(), q.dequantize()
        alias = q.tensors()
        size = q.nbytes
        kernels.linear(torch.randn(1, shape[1]), q)
        assert q.layout == "tiled"
        assert q.nbytes == size
        assert all(torch.equal(alias[k], before[k]) for k in before)  # who holds the old parts, holds what they were
        assert isinstance(q.laid_out, cpu.Tiled)
        assert torch.equal(q.laid_out.dequantize(torch.bfloat16), dense)
        if q.has_rows:
            index = torch.tensor([[shape[0] - 1, 0], [1, 1]])
            assert torch.equal(q.rows(index).dequantize(), dense[index])
            assert q.layout == "tiled"
        assert torch.equal(q.codes, codes)
        assert q.layout == "canonical"
        assert all(torch.equal(t, before[k]) for k, t in q.leaves().items())


@pytest.mark.parametrize("weight", INTEGERS)
@pytest.mark.parametrize("input", ["int8-channel", "int8-g128", "int8-g32"])
def test_codes_times_codes(isa: str, weight: str, input: str) -> None:
    for shape in ((72, 768), (7, 512), (33, 1280)):
        q = quantized(shape, weight, torch.float32)
        for rows in (1, 2, 3, 8, 11, 33):
            x = torch.randn(rows, shape[1]) + 0.1
            xq = kernels.quantize(x, input, kernels.qparams(x, input, "absmax"))
            bias = torch.randn(shape[0])
            want = exact(xq) @ exact(q).T + bias.double()
            assert error(kernels.linear(xq, q, bias), want) < 1e-6, rows


def test_inputs_that_no_integer_kernel_takes_are_dequantized(caplog: pytest.LogCaptureFixture) -> None:
    products.fall_back.cache_clear()
    q = quantized((16, 256), "nf4-g64", torch.float32)
    x = torch.randn(3, 256)
    xq = kernels.quantize(x, "int8-channel", kernels.qparams(x, "int8-channel", "absmax"))
    for _ in range(2):
        assert error(kernels.linear(xq, q), exact(xq) @ exact(q).T) < 1e-6
    assert [r.message for r in caplog.records if "int8-channel with nf4-g64" in r.message].__len__() == 1


def test_a_single_row(isa: str) -> None:
    q = quantized((1, 256), "q4_k", torch.float32)
    x = torch.randn(9, 256)
    torch.testing.assert_close(kernels.linear(x, q), x @ q.dequantize().T, rtol=1e-4, atol=1e-5)


def test_any_input_shape(isa: str) -> None:
    q = quantized((24, 256), "int4-g32", torch.float32)
    dense = q.dequantize()
    wide = torch.randn(4, 3, 512)
    for x in (wide[..., ::2], wide[:, 1, :256], wide[0, 0, :256], wide.transpose(0, 1)[..., 256:], wide[:0, :, :256]):
        torch.testing.assert_close(kernels.linear(x, q), x @ dense.T, rtol=1e-4, atol=1e-5)
    dy = torch.randn(2, 3, 48)[..., ::2]
    torch.testing.assert_close(kernels.linear_grad(dy, q), dy @ dense, rtol=1e-4, atol=1e-5)
    assert kernels.linear_grad(dy[:0], q).shape == (0, 3, 256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(isa: str, dtype: torch.dtype) -> None:
    q = quantized((24, 256), "nf4-g64", dtype)
    x, bias = torch.randn(5, 256).to(dtype).requires_grad_(), torch.randn(24).to(dtype).requires_grad_()
    dy = torch.randn(5, 24).to(dtype)
    got = torch.autograd.grad(kernels.linear(x, q, bias), (x, bias), dy)
    assert error(got[0], dy.double() @ exact(q)) <= 2 * torch.finfo(dtype).eps
    assert torch.equal(got[1], dy.sum(0))
    assert not kernels.linear(x.detach(), q).requires_grad


def test_threads_change_nothing(isa: str) -> None:
    q = quantized((200, 512), "q4_k")
    threads, x = torch.get_num_threads(), torch.randn(40, 512).bfloat16()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append((kernels.linear(x, q), kernels.linear(x[:1], q), kernels.linear_grad(x[:, :200], q)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize(
    ("shape", "format", "why"),
    [
        ((16, 64), "int3-g32", "integers of 4 or 8 bits"),
        ((16, 64), "fp8-e4m3-channel", "integers of 4 or 8 bits"),
        ((16, 64), "int8-tensor", "by group or by row"),
        ((2, 16, 64), "int4-g32", "take matrices"),
        ((16, 96), "nf4-g64", "whole groups"),
        ((16, 20), "int4-channel", "whole 32-bit words"),
        ((0, 64), "int4-g32", "not empty"),
    ],
)
def test_refusals_are_reasoned_and_the_call_is_served_all_the_same(
    shape: tuple[int, ...], format: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    products.fall_back.cache_clear()
    w = torch.randn(shape)
    q = kernels.quantize(w, format)
    assert why in (cpu.refuses(q) or "")
    if len(shape) == 2:
        x = torch.randn(3, shape[1])
        for _ in range(2):
            assert torch.equal(kernels.linear(x, q), x @ q.dequantize().T)
        assert len([r for r in caplog.records if why in r.message and r.levelno == logging.WARNING]) == 1
        assert why in kernels.served_by(q)["linear"]
    with pytest.raises(InputError, match=why):
        cpu.Tiled(q)


def test_other_input_dtypes_go_to_the_reference() -> None:
    q = quantized((16, 256), "int4-g32")
    kernels.linear(torch.randn(1, 256), q)
    x = torch.randn(3, 256, dtype=torch.float64)
    assert torch.equal(kernels.linear(x, q), x @ q.dequantize().double().T)


def test_the_reference_can_be_asked_for() -> None:
    q = quantized((16, 256), "int4-g32")
    x = torch.randn(3, 256).bfloat16()
    kernels.linear(x, q)
    with kernels.using("reference"):
        assert cpu.isa() == "reference"
        assert torch.equal(kernels.linear(x, q), torch.nn.functional.linear(x, q.dequantize()))
        assert kernels.served_by()["linear"].startswith("torch")
    assert cpu.isa() == cpu.isas()[0]
    with pytest.raises(InputError, match="avx9"), kernels.using("avx9"):
        pass


@pytest.mark.parametrize(("isa", "code"), [("generic", 0), ("reference", 0), ("nonsense", 2)])
def test_the_environment_chooses(isa: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "doctor"],
        env={**os.environ, "HALFBYTE_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert isa in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_calls_raise_and_touch_nothing() -> None:
    q = quantized((16, 256), "int4-g32")
    kernels.linear(torch.randn(1, 256), q)
    assert isinstance(q.laid_out, cpu.Tiled)
    m, x, y = q.laid_out.matrix, torch.randn(2, 256), torch.zeros(2, 16)
    for call in (
        lambda: m.linear(x.data_ptr(), x.nbytes, 0, 3, 0, 0, 0, y.data_ptr(), y.nbytes, 1),
        lambda: m.linear(x.data_ptr(), x.nbytes, 0, 2, 0, 0, 0, y.data_ptr(), y.nbytes - 1, 1),
        lambda: m.linear(x.data_ptr(), x.nbytes, 0, 2, y.data_ptr(), 63, 0, y.data_ptr(), y.nbytes, 1),
        lambda: m.linear(x.data_ptr(), x.nbytes, 0, -1, 0, 0, 0, y.data_ptr(), y.nbytes, 1),
        lambda: m.linear(x.data_ptr(), x.nbytes, 7, 2, 0, 0, 0, y.data_ptr(), y.nbytes, 1),
        lambda: m.linear(0, x.nbytes, 0, 2, 0, 0, 0, y.data_ptr(), y.nbytes, 1),
        lambda: m.linear(x.data_ptr(), 1 << 62, 0, 1 << 60, 0, 0, 0, y.data_ptr(), 1 << 62, 1),
        lambda: m.linear_grad(cpu.span(y), "float32", 2, cpu.span(x[:1]), "float32", 1),
        lambda: m.dequantize(0, 16, cpu.span(x), "float32", 1),
        lambda: m.dequantize(3, 1, cpu.span(x), "float32", 1),
        lambda: m.dequantize(0, 32, (x.data_ptr(), 1 << 30), "float32", 1),
        lambda: m.rows("codes", cpu.span(torch.tensor([0])), (y.data_ptr(), 127)),
        lambda: m.linear_int8(cpu.span(x), cpu.span(x), "float32", 3, 1, None, "float32", cpu.span(y), "float32", 1),
    ):
        with pytest.raises(ValueError, match=r"bytes where|too large|types 0 to 2|whole tiles|whole groups"):
            call()
    past, row = torch.tensor([16]), torch.empty(128, dtype=torch.uint8)
    with pytest.raises(IndexError, match="row 16 of 16"):
        m.rows("codes", cpu.span(past), cpu.span(row))
    assert (y == 0).all()
    codes, scale = torch.zeros(16 * 128, dtype=torch.uint8), torch.ones(16 * 8)
    good = {
        "rows": 16, "cols": 256, "bits": 4, "group": 32, "codes": cpu.span(codes), "table": [0.0] * 16, "middle": None,
        "scale": cpu._cpu.Values.floats("float32", cpu.span(scale)), "zero": None, "zero_added": False, "tiled": False,
    }  # fmt: skip
    assert not cpu._cpu.Matrix(**good).tiled
    for bad in (
        {"rows": 17}, {"cols": 512}, {"bits": 3}, {"group": 7}, {"group": 0}, {"table": [0.0]}, {"rows": 1 << 60},
        {"cols": 0},
        {"scale": cpu._cpu.Values.floats("float32", (scale.data_ptr(), 511))},
        {"zero": cpu._cpu.Values.bytes((codes.data_ptr(), 127))},
        {"scale": cpu._cpu.Values.nested(8, cpu.span(codes), [1.0] * 256, "float32", (scale.data_ptr(), 3), 16, 0.0)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"bytes where|too large|tiled|table"):
            cpu._cpu.Matrix(**{**good, **bad})


def test_shapes_that_do_not_fit_are_refused() -> None:
    q = quantized((16, 256), "int4-g32", torch.float32)
    x = torch.randn(3, 256)
    kernels.linear(x, q)
    xq = kernels.quantize(torch.randn(3, 128), "int8-channel")
    for call in (
        lambda: kernels.linear(torch.randn(4, 128), q),
        lambda: kernels.linear(x, q, torch.zeros(17)),
        lambda: kernels.linear_grad(torch.randn(3, 8), q),
        lambda: kernels.linear(xq, q),
    ):
        with pytest.raises(InputError, match=r"weight of shape \(16, 256\)"):
            call()


def laid_out_layer() -> tuple[torch.nn.Module, Linear, Tensor]:
    model = swap(torch.nn.Sequential(torch.nn.Linear(256, 48)))
    op = model[0]  # pyright: ignore[reportIndexIssue]
    assert isinstance(op, Linear)
    op.weight.store(quantized((48, 256), "q4_k", torch.float32))
    x = torch.randn(2, 256)
    model(x)
    assert isinstance(op.weight.stored, Codes)
    assert op.weight.stored.q.layout == "tiled"
    return model, op, x


@torch.no_grad()
def test_nothing_laid_out_is_ever_copied_or_saved() -> None:
    model, op, x = laid_out_layer()
    assert isinstance(op.weight.stored, Codes)
    want = model(x)
    state = model.state_dict()
    assert op.weight.stored.q.layout == "canonical"
    saved = {k: v.clone() for k, v in state.items()}
    assert torch.equal(model(x), want)
    assert all(torch.equal(state[k], saved[k]) for k in saved)  # a state taken before stays what it was
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), want)
    assert torch.equal(model(x), want)
    file = io.BytesIO(pickle.dumps(model))
    assert torch.equal(pickle.load(file)(x), want)
    other, _, _ = laid_out_layer()
    other.load_state_dict(saved)
    assert torch.equal(other(x), want)
    moved = model.to(torch.bfloat16)
    assert torch.equal(moved(x).float(), moved(x))
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items() if "stored" in k)


def test_a_layout_follows_memory_that_moved() -> None:
    q = quantized((16, 256), "int4-g32")
    x = torch.randn(2, 256)
    want = kernels.linear(x, q)
    q.leaves()["codes"].share_memory_()
    assert torch.equal(kernels.linear(x, q), want)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        q = quantized((16, 256), "int4-g32", torch.float32)
    x = torch.randn(2, 256)
    want = x @ q.dequantize().T
    torch.testing.assert_close(kernels.linear(x, q), want, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(kernels.linear(x, q), want, rtol=1e-4, atol=1e-5)
