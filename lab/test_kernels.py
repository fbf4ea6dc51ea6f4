
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

import pytest

import attention
from attention import FlashAttention, attend, plain_attention, project
from unet import UNet, UNetConfig
from conftest import UNETS, assert_close


@pytest.mark.parametrize("bias", [True, False])
def test_one_matrix_product_for_three_projections(monkeypatch, bias):
    torch.manual_seed(0)
    layers, x = [torch.nn.Linear(12, out, bias) for out in (12, 12, 8)], torch.randn(2, 5, 12)
    for on_gpu, joined in (False, False), (True, True):
        monkeypatch.setattr(attention, "has_kernels", lambda device, on_gpu=on_gpu: on_gpu)
        results = project(x, *layers)
        assert (len({y.untyped_storage().data_ptr() for y in results}) == 1) == joined
        for ours, layer in zip(results, layers, strict=True):
            assert_close(ours, layer(x))


def test_attention_equals_its_formula():
    """Heads laid out as in the formula; causal or not."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 12)
    for causal in (False, True):
        heads = []
        for h in range(3):
            a, b, c = (y[..., 4 * h:4 * h + 4] for y in (q, k, v))
            scores = a @ b.transpose(1, 2) / 2  # √4
            if causal:
                scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ c)
        assert_close(attend(q, k, v, heads=3, causal=causal), torch.cat(heads, dim=-1))


# --- the kernels, on a GPU if there is one, else on Triton's interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
needs_triton = pytest.mark.skipif(attention.triton is None, reason="no Triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run here")
def test_triton_is_not_imported_where_its_kernels_cannot_run():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import sys, attention; assert attention.triton is None and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=Path(attention.__file__).parent)


def random_tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def flash_and_plain(q, k, v, heads, needed=(True, True, True)):
    """-> [(ours, the formula's in float64)] of the output and of the gradients needed of q, k and v."""
    ours = [x.detach().requires_grad_(need) for x, need in zip((q, k, v), needed)]
    plain = [x.detach().double().requires_grad_(need) for x, need in zip((q, k, v), needed)]
    outputs = FlashAttention.apply(*ours, heads), plain_attention(*plain, heads)
    assert outputs[0].is_contiguous() and outputs[0].dtype == q.dtype
    d_out = random_tokens(*q.shape, dtype=q.dtype)
    for output in outputs:
        output.backward(d_out.to(output.dtype))
    assert [x.grad is not None for x in ours] == list(needed)
    return [outputs, *((a.grad, b.grad) for a, b, need in zip(ours, plain, needed) if need)]


def assert_flash_equals_plain(*args, **kwargs):
    for ours, plain in flash_and_plain(*args, **kwargs):  # of order one, or smaller where there are many keys
        assert (ours - plain).abs().max() <= ERRORS[ours.dtype] * plain.abs().max().clamp(min=1)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16,
                                   pytest.param(torch.bfloat16, marks=needs_gpu)])  # not in the interpreter's products
@pytest.mark.parametrize("B, heads, d, N, M", [
    (1, 2, 40, 129, None), (2, 1, 64, 80, None), (1, 1, 80, 77, None), (1, 1, 160, 65, None),  # None: self-attention
    (1, 2, 40, 129, 77), (2, 1, 64, 33, 78), (1, 2, 80, 65, 80), (1, 1, 160, 65, 77),
    (1, 3, 40, 1, None), (2, 1, 80, 7, 129), (1, 1, 160, 1, 7), (2, 2, 64, 78, 1), (1, 2, 8, 20, 20),
    *(pytest.param(1, heads, d, N, M, marks=needs_gpu)
      for side, heads, d in [(96, 5, 64), (64, 8, 40), (48, 10, 64), (32, 8, 80), (16, 8, 160), (8, 8, 160)]
      for N in [side * side] for M in (None, 77, 78)),
])  # fmt: skip
def test_flash_attention_equals_the_formula(B, heads, d, N, M, dtype):
    torch.manual_seed(0)
    C = heads * d
    if M is None:
        q, k, v = random_tokens(B, N, 3 * C, dtype=dtype).split(C, dim=-1)
    else:
        q, (k, v) = random_tokens(B, N, C, dtype=dtype), random_tokens(B, M, 2 * C, dtype=dtype).split(C, dim=-1)
    assert_flash_equals_plain(q, k, v, heads)


@needs_triton
def test_flash_attention_of_any_strides():
    torch.manual_seed(0)
    q = random_tokens(80, 2, 20).transpose(0, 2)  # (20, 2, 80): nothing is where one would expect it
    q, k, v = q.transpose(0, 1), random_tokens(1, 7, 80).expand(2, 7, 80), random_tokens(2, 14, 160)[:, ::2, ::2]
    assert_flash_equals_plain(q, k, v, 2)


@needs_triton
@pytest.mark.parametrize("programs", [1, 6, 10**6])  # 1, 3 and 5 shares of the 5 blocks of queries
def test_queries_dealt_out_to_several_programs(programs, monkeypatch):
    monkeypatch.setattr(attention, "PROGRAMS", programs)
    torch.manual_seed(0)
    assert_flash_equals_plain(random_tokens(1, 70, 40), *random_tokens(2, 1, 17, 40), 1)


@needs_triton
@pytest.mark.parametrize("needed, unused", [((False, True, True), "dq_kernel"), ((True, False, False), "dkv_kernel")])
def test_no_work_for_gradients_that_nobody_needs(needed, unused, monkeypatch):
    monkeypatch.delattr(attention, unused)
    torch.manual_seed(0)
    assert_flash_equals_plain(random_tokens(1, 20, 40), *random_tokens(2, 1, 17, 40), 1, needed=needed)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of ∞, which the interpreter computes with
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_float16(sign):
    """SD 2.1's, positive; negative ones make the exponentials of keys that are only there to fill a block infinite."""
    torch.manual_seed(0)
    q, k = random_tokens(1, 20, 40) + 45, random_tokens(1, 77, 40) + sign * 45  # q·k = ±81000
    q, k, v = q.half(), k.half(), random_tokens(1, 77, 40).half()
    assert not (q @ k.transpose(1, 2)).isfinite().any()
    (ours, plain), *gradients = flash_and_plain(q, k, v, 1)
    assert_close(ours, plain, 1e-2)
    assert all(ours.isfinite().all() for ours, _ in gradients)


@needs_triton
def test_attend_chooses_the_kernels_for_the_unet(monkeypatch):
    torch.manual_seed(0)
    used, forward = [], FlashAttention.forward

    def counted(ctx, q, k, v, heads):
        used.append((q.shape[1], k.shape[1]))
        return forward(ctx, q, k, v, heads)

    monkeypatch.setattr(FlashAttention, "forward", staticmethod(counted))
    unet = UNet(UNetConfig(**UNETS["2.x"])).to(DEVICE, torch.float16).requires_grad_(False)
    x, context = random_tokens(1, 4, 8, 8).half(), random_tokens(1, 78, 40).half().requires_grad_()
    results = []
    for has_kernels in (False, True):
        monkeypatch.setattr(attention, "has_kernels", lambda device: has_kernels)
        output = unet(x, 500, context)
        results.append([output, *torch.autograd.grad(output.square().sum(), context)])
        assert len(used) == (2 * 11 if has_kernels else 0)  # a self- and a cross-attention in each transformer
    for plain, ours in zip(*results):
        assert_close(ours, plain, 1e-2)
    assert (64, 64) in used and (64, 78) in used

    used.clear()
    x = random_tokens(1, 5, 512)
    for y, heads, causal in [(x, 8, False), (x.bfloat16(), 8, True), (x.bfloat16(), 1, False)]:
        attend(y, y, y, heads, causal)  # float32, the text tower's, the VAE's
    assert not used
