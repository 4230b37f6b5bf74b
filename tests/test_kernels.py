"""The custom ops refuse what they cannot read, in one sentence, and are registered as torch expects."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import processes
import pytest
import torch
from test_compiling import has_compiler
from torch._subclasses.fake_tensor import FakeTensorMode

from dynamo_lm.kernels import loader
from dynamo_lm.private_interfaces import compile_for_cpu

pytestmark = pytest.mark.skipif(not loader.available(), reason="the kernels are not built here")


def matmul(x, weight, bias=None):
    return torch.ops.dynamo_lm.skinny_matmul(x, weight, bias)


def attention(query, key, value, mask):
    return torch.ops.dynamo_lm.decode_attention(query, key, value, mask, 0.25)


def states(rows=1, heads=4, length=3, width=16, dtype=torch.float32):
    return torch.randn(rows, heads, length, width, dtype=dtype)


def sentence(refusal) -> str:
    """What a kernel says, without what torch adds behind it."""
    return str(refusal.value).split("\n")[0]


SEEN = torch.ones(1, 1, 3, 5, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_are_registered_as_torch_expects(dtype):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    product = (torch.randn(3, 32, dtype=dtype), torch.randn(7, 32, dtype=dtype), torch.randn(7, dtype=dtype))
    torch.library.opcheck(torch.ops.dynamo_lm.skinny_matmul.default, product, test_utils=checks)
    torch.library.opcheck(torch.ops.dynamo_lm.skinny_matmul.default, (*product[:2], None), test_utils=checks)
    key = states(heads=2, length=5, dtype=dtype)
    call = (states(dtype=dtype), key, key.clone(), SEEN, 0.25)
    torch.library.opcheck(torch.ops.dynamo_lm.decode_attention.default, call, test_utils=checks)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "words"),
    [
        (torch.randn(2, 16), torch.randn(4, 32), None, "last size of x"),
        (torch.randn(2, 24), torch.randn(4, 24), None, "multiple of 16"),
        (torch.randn(2, 0), torch.randn(4, 0), None, "multiple of 16"),
        (torch.randn(2, 16), torch.randn(16, 4).t(), None, "contiguous"),
        (torch.randn(2, 16), torch.randn(4, 32)[:, ::2], None, "contiguous"),
        (torch.ones(2, 16, dtype=torch.int64), torch.ones(4, 16, dtype=torch.int64), None, "float32 or bfloat16"),
        (torch.ones(2, 16, dtype=torch.float64), torch.ones(4, 16, dtype=torch.float64), None, "float32 or bfloat16"),
        (torch.randn(2, 16), torch.randn(4, 16).bfloat16(), None, "dtype of x"),
        (torch.randn(2, 16), torch.randn(16), None, "two dimensions"),
        (torch.tensor(1.0), torch.randn(4, 16), None, "no dimension"),
        (torch.randn(2, 16), torch.randn(4, 16), torch.randn(3), "bias"),
        (torch.randn(2, 16), torch.randn(4, 16), torch.randn(4).bfloat16(), "bias"),
        (torch.randn(2, 16), torch.randn(4, 16), torch.randn(8)[::2], "bias"),
    ],
)
def test_a_product_of_what_does_not_fit_is_refused(x, weight, bias, words):
    with pytest.raises(RuntimeError, match=words) as refusal:
        matmul(x, weight, bias)
    with pytest.raises(RuntimeError, match=words) as traced, FakeTensorMode() as mode:
        matmul(*(tensor if tensor is None else mode.from_tensor(tensor) for tensor in (x, weight, bias)))
    assert str(traced.value) == sentence(refusal)


@pytest.mark.parametrize(
    ("query", "key", "value", "mask", "words"),
    [
        (states(width=8), states(length=5, width=8), states(length=5, width=8), SEEN, "multiple of 16"),
        (states(), states(length=5, width=32), states(length=5, width=32), SEEN, "one width"),
        (states(), states(length=5), states(length=4), SEEN, "same shape"),
        (states(heads=4), states(heads=3, length=5), states(heads=3, length=5), SEEN, "multiple of those of key"),
        (states(), states(rows=2, length=5), states(rows=2, length=5), SEEN, "as many rows"),
        (states(), states(length=5), states(length=5), SEEN.float(), "mask must be bool"),
        (states(), states(length=5), states(length=5), SEEN[..., :4], "mask must be"),
        (states(), states(length=5), states(length=5), SEEN[:, :, :2], "mask must be"),
        (states(), states(length=5), states(length=5), SEEN[0], "four dimensions"),
        (states(dtype=torch.float64), states(length=5), states(length=5), SEEN, "float32 or bfloat16"),
        (states(), states(length=5, dtype=torch.bfloat16), states(length=5, dtype=torch.bfloat16), SEEN, "dtype of query"),
        (states(), states(length=0), states(length=0), SEEN[..., :0], "no keys"),
    ],
)
def test_attention_over_what_does_not_fit_is_refused(query, key, value, mask, words):
    with pytest.raises(RuntimeError, match=words) as refusal:
        attention(query, key, value, mask)
    with pytest.raises(RuntimeError, match=words) as traced, FakeTensorMode() as mode:
        attention(*map(mode.from_tensor, (query, key, value, mask)))
    assert str(traced.value) == sentence(refusal)


def test_nothing_in_is_nothing_out():
    assert matmul(torch.randn(0, 16), torch.randn(4, 16)).shape == (0, 4)
    assert matmul(torch.randn(2, 16), torch.randn(0, 16)).shape == (2, 0)
    none = torch.ones(1, 1, 0, 5, dtype=torch.bool)
    assert attention(states(length=0), states(length=5), states(length=5), none).shape == (1, 0, 4, 16)


def test_gradients_are_refused_in_the_forward():
    weight = torch.randn(4, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="skinny_matmul has no gradient"):
        matmul(torch.randn(2, 16), weight)
    key = states(length=5)
    with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
        attention(states().requires_grad_(), key, key, SEEN)
    with torch.no_grad():
        assert matmul(torch.randn(2, 16), weight).shape == (2, 4)


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_check_that_fails_inside_compiled_code_keeps_its_sentence():
    class Product(torch.nn.Module):
        def forward(self, x, weight):
            return (matmul(x, weight) + 1,)

    x, weight = torch.randn(2, 16), torch.randn(4, 16)
    with torch.inference_mode():
        run = compile_for_cpu(torch.fx.symbolic_trace(Product()), [x, weight], lambda inner: inner)
        torch.testing.assert_close(run(x, weight)[0], x @ weight.t() + 1)
        with pytest.raises(RuntimeError, match="skinny_matmul: weight must be contiguous"):
            run(x, torch.randn(16, 4).t())


def test_other_libraries_do_not_see_the_symbols_of_the_kernels():
    import ctypes

    assert not hasattr(ctypes.CDLL(None), "dynamo_lm_skinny_matmul")


@pytest.fixture
def loads_kernels(tmp_path):
    """A function that loads the kernels in a new process, with a compiler that refuses everything, and its cache folder."""
    broken, cache = tmp_path / "c++", tmp_path / "cache"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "c++ 1.0" && exit 0\n'
        'echo "x.cpp:1: error: this compiler refuses" >&2; exit 1\n'
    )
    broken.chmod(0o755)

    def load(setting: str = "") -> tuple[str, str]:
        settings = {"CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(cache), "DYNAMO_LM_KERNELS": setting}
        files = [Path(tempfile.mkstemp(dir=tmp_path)[1]) for _ in range(2)]
        process = processes.start(processes.kernels, stdout=files[0], stderr=files[1], environment=settings)
        process.join()
        assert process.exitcode == 0, files[1].read_text()
        return files[0].read_text(), files[1].read_text()

    return load, cache


def test_a_build_that_failed_is_remembered_and_reported(loads_kernels):
    load, _ = loads_kernels
    runs = [load("wait") for _ in range(2)]
    assert all("not in use" in printed and "this compiler refuses" in printed for printed, _ in runs)
    assert "could not be built" in runs[0][1] and "could not be built" not in runs[1][1]


def test_the_first_process_does_not_wait_for_the_build_and_the_next_one_hears_of_it(loads_kernels):
    load, cache = loads_kernels
    printed, warned = load()
    assert "being built in the background" in printed and "being built in the background" in warned
    while not list(cache.glob("dynamo_lm/build-failed-*")):
        time.sleep(0.1)
    printed, warned = load()
    assert "this compiler refuses" in printed and "could not be built" in warned
