"""Tests of attention.py. The kernels run on a GPU if there is one, else in Triton's interpreter."""

import inspect
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import torch

import pytest

import attention
from attention import FlashAttention, attend, plain_attention, triton
from conftest import REPOSITORY, UNETS, assert_close
from unet import UNet, UNetConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3} | ({torch.bfloat16: 2e-2} if DEVICE == "cuda" else {})
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
tokens = partial(torch.randn, device=DEVICE)  # (B, N, C) by its shape


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_attention_equals_its_formula_head_by_head():
    q, k, v = torch.randn(3, 2, 5, 12)
    heads = [(a @ b.mT / 2).softmax(-1) @ c for a, b, c in zip(*(x.split(4, -1) for x in (q, k, v)))]  # 2 = √4
    for function in (attend, plain_attention):
        assert_close(function(q, k, v, heads=3), torch.cat(heads, dim=-1))
    causal = attend(q, k, v, heads=3, causal=True)
    for i in range(5):
        assert_close(causal[:, i:i + 1], attend(q[:, i:i + 1], k[:, :i + 1], v[:, :i + 1], heads=3))
    half = q.half(), k.half(), v.half()
    assert torch.equal(attend(*half, heads=3, upcast=True), attend(*(x.float() for x in half), heads=3).half())


def assert_flash_equals_plain(q, k, v, heads, needed=(True, True, True)):
    """Outputs, and the gradients needed of q, k and v. The formula is computed in float64."""
    flash = [x.detach().requires_grad_(need) for x, need in zip((q, k, v), needed)]
    plain = [x.detach().double().requires_grad_(need) for x, need in zip((q, k, v), needed)]
    outputs, d_out = (FlashAttention.apply(*flash, heads), plain_attention(*plain, heads)), tokens(q.shape)
    assert outputs[0].is_contiguous() and outputs[0].dtype == q.dtype
    for output in outputs:
        output.backward(d_out.to(q.dtype).to(output.dtype))
    assert [x.grad is not None for x in flash] == list(needed)
    for a, b in [outputs, *((x.grad, y.grad) for x, y, need in zip(flash, plain, needed) if need)]:
        assert (a - b).abs().max() <= ERRORS[q.dtype] * b.abs().max().clamp(min=1)  # b is of order one or smaller


@needs_triton
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("B, heads, d, N, M", [
    (1, 2, 40, 129, 129), (2, 1, 64, 80, 80), (1, 1, 80, 77, 77), (1, 1, 160, 65, 65), (1, 2, 8, 20, 20),
    (1, 2, 40, 129, 77), (2, 1, 64, 33, 78), (1, 2, 80, 65, 80), (1, 1, 160, 65, 77),
    (1, 3, 40, 1, 1), (2, 1, 80, 7, 129), (1, 1, 160, 1, 7), (2, 2, 64, 78, 1),
    *((1, heads, d, N, M) for N, heads, d in [(9216, 5, 64), (4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160)]
      for M in (N, 77, 78) if DEVICE == "cuda")])  # the UNet's
def test_flash_attention_and_its_gradient_equal_the_formula(B, heads, d, N, M, dtype):
    q = tokens(B, N, 3 * heads * d, dtype=dtype)[..., : heads * d]  # slices, as they come from `project`
    k, v = tokens(B, M, 2 * heads * d, dtype=dtype).chunk(2, dim=-1)
    assert_flash_equals_plain(q, k, v, heads)


@needs_triton
def test_any_strides_and_splits_and_no_unneeded_gradients(monkeypatch):
    q = tokens(80, 20, 2).permute(2, 1, 0)  # (2, 20, 80), its channels farthest apart
    assert_flash_equals_plain(q, tokens(1, 7, 80).expand(2, 7, 80), tokens(2, 14, 160)[:, ::2, ::2], 2)
    q, k, v = tokens(1, 70, 40), *tokens(2, 1, 17, 40)
    for programs in (1, 6, 10**6):  # 1, 3 and 5 splits of the 5 blocks of queries
        monkeypatch.setattr(attention, "PROGRAMS", programs)
        assert_flash_equals_plain(q, k, v, 1)
    for needed, unused in ((False, True, True), "dq_kernel"), ((True, False, False), "dkv_kernel"):
        with monkeypatch.context() as patch:
            patch.delattr(attention, unused)
            assert_flash_equals_plain(q, k, v, 1, needed)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of ∞, which the interpreter computes with
@pytest.mark.parametrize("sign", [1, -1])  # SD 2.1's are positive; negative ones make exp(s − lse) of padded keys ∞
def test_scores_beyond_float16(sign):
    q, k, v = (tokens(1, 20, 40) + 45).half(), (tokens(1, 77, 40) + sign * 45).half(), tokens(1, 77, 40).half()
    assert not (q @ k.mT).isfinite().any()  # ±81000
    inputs, formula = [x.requires_grad_() for x in (q, k, v)], plain_attention(q.double(), k.double(), v.double(), 1)
    output = FlashAttention.apply(*inputs, 1)
    assert_close(output, formula, 1e-2)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output, inputs, tokens(1, 20, 40).half()))


@needs_triton
def test_attend_uses_the_kernels_for_the_unet_in_half_precision(monkeypatch):
    monkeypatch.setattr(FlashAttention, "apply", spy := Mock(wraps=FlashAttention.apply))
    unet = UNet(UNetConfig(**UNETS["2.x"])).to(DEVICE, torch.float16).requires_grad_(False)
    x, context = tokens(1, 4, 8, 8).half(), tokens(1, 78, 40).half().requires_grad_()
    results = []
    for has_kernels in (False, True):
        monkeypatch.setattr(attention, "has_kernels", lambda device: has_kernels)
        output = unet(x, torch.tensor([500], device=DEVICE), context)
        results.append([output, *torch.autograd.grad(output.square().sum(), context)])
        assert spy.call_count == (2 * 11 if has_kernels else 0)  # self- and cross-attention in each transformer block
    for plain, flash in zip(*results):
        assert_close(flash, plain, 1e-2)
    assert {(64, 64), (64, 78)} <= {(q.shape[1], k.shape[1]) for (q, k, *_), _ in spy.call_args_list}

    spy.reset_mock()
    x = tokens(1, 5, 512)
    for y, heads, causal in [(x, 8, False), (x.bfloat16(), 8, True), (x.bfloat16(), 1, False)]:
        attend(y, y, y, heads, causal)  # float32, the text encoder's, the VAE's
    assert not spy.called


def compile_kernels():
    """Run FlashAttention on CPU tensors while each launch only compiles its kernel. Prints the kernels' names."""
    run = triton.JITFunction.run

    def compile_only(kernel, *args, warmup, **options):
        compiled = run(kernel, *args, warmup=True, **options)  # Triton's ASTSource, with the options of this launch
        ptx, shared, where = compiled.asm["ptx"], compiled.metadata.shared, (kernel.__name__, capability, d, dtype)
        assert f".target sm_{capability}" in ptx and "cubin" in compiled.asm, where
        assert "mma." in ptx, where  # products on the matrix units
        assert shared <= 99 * 1024, (*where, shared)  # bytes: the limit of 8.6, the lowest from 8.0 on
        print(kernel.__name__)

    triton.JITFunction.run = compile_only
    for capability, dtypes in (80, (torch.float16, torch.bfloat16)), (90, (torch.bfloat16, torch.float16)):
        target = triton.backends.compiler.GPUTarget("cuda", capability, warp_size=32)
        triton.runtime.driver.set_active(SimpleNamespace(  # Triton compiles anew for each device
            get_current_device=lambda: capability, get_current_stream=lambda _: 0, get_current_target=lambda: target))
        for (N, heads, d), dtype in zip([(4096, 8, 40), (9216, 5, 64), (1024, 8, 80), (256, 8, 160)], 2 * dtypes):
            q, k, v = torch.zeros(1, N, 3 * heads * d, dtype=dtype, requires_grad=True).chunk(3, dim=-1)
            FlashAttention.apply(q, k, v, heads).backward(q)
            FlashAttention.apply(q, k[:, :77], v[:, :77], heads)  # a prompt's; the backward options are the same


@needs_triton
def test_every_kernel_compiles_for_compute_capabilities_8_and_9_and_fits_their_shared_memory(tmp_path):
    imports = "import torch\nfrom types import SimpleNamespace\nfrom attention import FlashAttention, triton\n"
    code = imports + inspect.getsource(compile_kernels) + "compile_kernels()"
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    names = subprocess.check_output([sys.executable, "-c", code], env=env, text=True, cwd=REPOSITORY)
    assert names.split() == 8 * "forward_kernel dq_kernel dkv_kernel forward_kernel".split()
