"""Multi-head attention for the UNet, the VAE and the CLIP encoders.

A layer keeps its projections under the checkpoint's parameter names (`to_q` or `q_proj`, …) and calls

    q, k, v = project(x, self.to_q, self.to_k, self.to_v)
    x = attend(q, k, v, heads)

`plain_attention` is the formula. `attend` computes it with torch's scaled_dot_product_attention or, for the UNet on a
GPU, with the Triton kernels below (flash attention, forward and backward pass).
"""

from __future__ import annotations  # tl.constexpr below is not looked up where Triton is absent

import math
import os
from contextlib import suppress

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

# Triton takes 70 MB of memory, so it is imported only where it is used: with a GPU, or where TRITON_INTERPRET is set
# (1 runs the kernels on a CPU, 0 only compiles them: lab/test_kernels.py).
triton = None
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    with suppress(ImportError):
        import triton
        import triton.language as tl


def plain_attention(q, k, v, heads):
    """softmax(q kᵀ / √d) v per head, as a reference: q (B, N, heads·d), k and v (B, M, heads·d) -> (B, N, heads·d)."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, N, M)
    return rearrange(scores.softmax(dim=-1) @ v, "b h n d -> b n (h d)")


def project(x, *layers):
    """Apply several linear layers to one input: (B, N, C) -> one (B, N, C_i) per layer.

    Either all layers have a bias or none has. With the kernels this is one matrix product: they read slices in place.
    """
    if not has_kernels(x.device):  # joined weights save nothing on a CPU, but autograd would keep them
        return [layer(x) for layer in layers]
    # The weights are joined on the fly, so the layers stay ordinary ones for training and saving.
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


def attend(q, k, v, heads, causal=False, upcast=False):
    """Multi-head attention of q (B, N, heads·d) over k and v (B, M, heads·d) -> (B, N, heads·d).

    causal: token i attends to tokens 0 … i (CLIP's text encoder).
    upcast: compute in float32 whatever the input's dtype (the scores of SD 2.1 overflow float16).
    """
    # The kernels compute scores in float32 anyway. Float32 inputs go to torch: the kernels would not use matrix units.
    if has_kernels(q.device) and q.dtype.itemsize == 2 and q.shape[-1] // heads <= MAX_HEAD_SIZE and not causal:
        return FlashAttention.apply(q, k, v, heads)
    dtype = q.dtype
    q, k, v = (rearrange(x.float() if upcast else x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(x, "b h n d -> b n (h d)").to(dtype)


# ── Flash attention in Triton: plain_attention and its gradient, without storing the (N, M) scores ──────────────────
#
# Sources: FlashAttention (arXiv 2205.14135) and FlashAttention-2 (arXiv 2307.08691: Algorithm 1 is the forward pass,
# Algorithm 2 the backward pass). The kernels are tested in Triton's interpreter on a CPU and compiled for compute
# capabilities 8.0 and 9.0. They have not run on a GPU: no speed is measured.
#
# Forward pass. For one query with scores s_j = q·k_j / √d, the output is Σ exp(s_j) v_j / Σ exp(s_j). A program (one
# cell of the launch grid) visits the keys in blocks and keeps three running values:
#
#     m = max s_j      l = Σ exp(s_j − m)      acc = Σ exp(s_j − m) v_j
#
# When a block raises m to m′, l and acc are multiplied by exp(m − m′). The output is acc / l in the end. Only
# lse = m + log l, one number per query and head, is stored for the backward pass.
#
# Backward pass. P are the (N, M) softmax weights, recomputed as exp(s − lse). dP = dO Vᵀ is their gradient:
#
#     dV = Pᵀ dO      dS = P ∘ (dP − δ)      dQ = dS K / √d      dK = dSᵀ Q / √d
#
# The softmax gives δ_i = Σ_j P_ij dP_ij. That is dO_i · O_i, which needs no P, because dP_ij = dO_i · v_j. dQ sums over
# keys, dK and dV sum over queries: two kernels that both recompute P, so that no sum needs atomic additions.
#
# Blocks. A program finds its head's d channels inside rows of (B, N, heads·d) tensors, so nothing is transposed or
# copied, even where q, k and v are slices of one projection. Block sizes are powers of two: rows beyond the last and
# channels beyond d are loaded as zeros and not stored. Sums are float32. Exponentials are to base 2, for which GPUs
# have an instruction: scale2 = log₂(e) / √d, and s, m and lse are to base 2 as well.
# Shapes: N queries, M keys; block_n and block_m of them in a block; D is d padded to a power of two.

MAX_HEAD_SIZE = 160  # SD 1.x has 40, 80 and 160, SD 2.x 64. The VAE's 512 has no launch options below.
kernel = triton.jit if triton else lambda function: function


def has_kernels(device):
    """Whether the kernels can run on `device`: an NVIDIA GPU of compute capability 8.0 (2020) or later.

    Earlier ones lack bfloat16 or shared memory. Triton launches on the current GPU, so `device` has to be that one.
    """
    if triton is None or torch.version.cuda is None or device.type != "cuda":
        return False
    return device.index == torch.cuda.current_device() and torch.cuda.get_device_properties(device).major >= 8


@kernel
def load(x, rows, n_rows, stride, d: tl.constexpr, D: tl.constexpr):
    """Rows `rows` (n,) of one head -> (n, D). The head starts at x and has n_rows rows, `stride` apart."""
    channels = tl.arange(0, D)
    inside = (rows < n_rows)[:, None] & (channels < d)[None, :]
    return tl.load(x + rows[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@kernel
def store(x, block, rows, n_rows, stride, d: tl.constexpr, D: tl.constexpr):
    """The reverse of `load`: block (n, D) -> rows of x, in x's dtype."""
    channels = tl.arange(0, D)
    inside = (rows < n_rows)[:, None] & (channels < d)[None, :]
    tl.store(x + rows[:, None] * stride + channels[None, :], block, mask=inside)


@kernel
def dot(a, b, acc=None):
    """acc + a b, summed in float32. "ieee" keeps float32 inputs exact: the default rounds them to TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@kernel
def forward_kernel(q, k, v, out, lse, q_b, q_n, k_b, k_n, v_b, v_n, N, M, scale2,
                   d: tl.constexpr, D: tl.constexpr, block_n: tl.constexpr, block_m: tl.constexpr):  # fmt: skip
    """out (B, N, heads·d) and lse (B, heads, N). A program has a block of queries and loops over the keys.

    q_b and q_n: q's strides from sample to sample and from token to token. Grid: blocks of queries, heads, B.
    """
    h, heads, b = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)  # b · q_b may exceed 2³¹
    q, k, v = q + b * q_b + h * d, k + b * k_b + h * d, v + b * v_b + h * d
    out, lse = out + b * N * heads * d + h * d, lse + (b * heads + h) * N

    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)
    q_block = load(q, rows, N, q_n, d, D)  # (block_n, D)
    m, l = tl.full([block_n], float("-inf"), tl.float32), tl.zeros([block_n], tl.float32)
    acc = tl.zeros([block_n, D], tl.float32)
    for start in range(0, M, block_m):
        keys = start + tl.arange(0, block_m)
        s = dot(q_block, tl.trans(load(k, keys, M, k_n, d, D))) * scale2  # (block_n, block_m)
        s = tl.where((keys < M)[None, :], s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new_m[:, None])  # at most 1, so float16 holds it
        correction = tl.exp2(m - new_m)  # 0 in the first block
        l = l * correction + tl.sum(p, 1)
        v_block = load(v, keys, M, v_n, d, D)
        acc = dot(p.to(v_block.dtype), v_block, acc * correction[:, None])
        m = new_m
    store(out, acc / l[:, None], rows, N, heads * d, d, D)
    tl.store(lse + rows, m + tl.log2(l), mask=rows < N)


@kernel
def dq_kernel(q, k, v, d_out, lse, delta, dq, q_b, q_n, k_b, k_n, v_b, v_n, N, M, scale, scale2,
              d: tl.constexpr, D: tl.constexpr, block_n: tl.constexpr, block_m: tl.constexpr):  # fmt: skip
    """dq (B, N, heads·d). A program has a block of queries and loops over the keys. Grid: as `forward_kernel`."""
    h, heads, b = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    head = b * N * heads * d + h * d
    q, k, v = q + b * q_b + h * d, k + b * k_b + h * d, v + b * v_b + h * d

    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)
    q_block, d_out_block = load(q, rows, N, q_n, d, D), load(d_out + head, rows, N, heads * d, d, D)  # (block_n, D)
    lse_block = tl.load(lse + (b * heads + h) * N + rows, mask=rows < N, other=0.0)
    delta_block = tl.load(delta + (b * heads + h) * N + rows, mask=rows < N, other=0.0)
    acc = tl.zeros([block_n, D], tl.float32)
    for start in range(0, M, block_m):
        keys = start + tl.arange(0, block_m)
        k_block, v_block = load(k, keys, M, k_n, d, D), load(v, keys, M, v_n, d, D)  # (block_m, D)
        p = tl.exp2(dot(q_block, tl.trans(k_block)) * scale2 - lse_block[:, None])  # (block_n, block_m)
        p = tl.where((keys < M)[None, :], p, 0.0)  # keys of zeros may have 2^−lse = ∞, and ∞ · 0 is NaN
        ds = p * (dot(d_out_block, tl.trans(v_block)) - delta_block[:, None])
        acc = dot(ds.to(k_block.dtype), k_block, acc)
    store(dq + head, acc * scale, rows, N, heads * d, d, D)


@kernel
def dkv_kernel(q, k, v, d_out, lse, delta, dk, dv, q_b, q_n, k_b, k_n, v_b, v_n, N, M, q_split, scale, scale2,
               d: tl.constexpr, D: tl.constexpr, block_n: tl.constexpr, block_m: tl.constexpr):  # fmt: skip
    """dk and dv (splits, B, M, heads·d). A program has a block of keys and loops over one split of q_split queries.

    Grid: blocks of keys × splits, heads, B. Rows beyond M may become ∞, but stay in their rows and are not stored.
    """
    blocks = tl.cdiv(M, block_m)
    i, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    h, heads, b = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    q, k, v = q + b * q_b + h * d, k + b * k_b + h * d, v + b * v_b + h * d
    d_out, lse, delta = d_out + b * N * heads * d + h * d, lse + (b * heads + h) * N, delta + (b * heads + h) * N
    head = (split * tl.num_programs(2) + b) * M * heads * d + h * d

    keys = i * block_m + tl.arange(0, block_m)
    k_block, v_block = load(k, keys, M, k_n, d, D), load(v, keys, M, v_n, d, D)  # (block_m, D)
    dk_acc, dv_acc = tl.zeros([block_m, D], tl.float32), tl.zeros([block_m, D], tl.float32)
    for start in range(split * q_split, tl.minimum(split * q_split + q_split, N), block_n):
        rows = start + tl.arange(0, block_n)
        q_block, d_out_block = load(q, rows, N, q_n, d, D), load(d_out, rows, N, heads * d, d, D)  # (block_n, D)
        lse_block = tl.load(lse + rows, mask=rows < N, other=0.0)
        delta_block = tl.load(delta + rows, mask=rows < N, other=0.0)
        p = tl.exp2(dot(k_block, tl.trans(q_block)) * scale2 - lse_block[None, :])  # (block_m, block_n): Pᵀ
        dv_acc = dot(p.to(d_out_block.dtype), d_out_block, dv_acc)
        ds = p * (dot(v_block, tl.trans(d_out_block)) - delta_block[None, :])  # (block_m, block_n): dSᵀ
        dk_acc = dot(ds.to(q_block.dtype), q_block, dk_acc)
    store(dk + head, dk_acc * scale, keys, M, heads * d, d, D)
    store(dv + head, dv_acc, keys, M, heads * d, d, D)


# Launch options by D: (block_n, block_m, num_warps, num_stages). A warp is 32 threads; num_stages blocks are in flight.
# Larger blocks reuse a loaded value more often. Their limits: a thread's 255 registers, and the 99 KB of shared memory
# that any GPU in `has_kernels` offers. Chosen from the compiler's report, not measured (lab/bench.py would).
FORWARD = {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}
FORWARD_ONE_BLOCK = {64: (64, 128, 4, 1), 128: (64, 128, 8, 1)}  # at most 128 keys, such as a prompt's 77
BACKWARD = {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)}
FLOAT32 = (16, 16, 4, 1)  # only in tests: twice the bytes, and without matrix units more registers
PROGRAMS = 256  # meant to keep a GPU busy, two for each of an H100's 132 processors: a guess, not measured


def launch_options(d, M, dtype):
    """-> D, and the options of the forward and of the backward kernels as two dictionaries."""
    D = max(64, triton.next_power_of_2(d))
    short = FORWARD_ONE_BLOCK if M <= 128 else {}
    options = [short.get(D, FORWARD[D]), BACKWARD[D]] if dtype.itemsize == 2 else [FLOAT32, FLOAT32]
    return D, *(dict(zip(("block_n", "block_m", "num_warps", "num_stages"), values)) for values in options)


class FlashAttention(torch.autograd.Function):
    """`plain_attention` by the kernels. It never waits for the GPU, so a CUDA graph should record it (not tested)."""

    @staticmethod
    def forward(ctx, q, k, v, heads):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        B, N, channels = q.shape
        M, d = k.shape[1], channels // heads
        D, options, _ = launch_options(d, M, q.dtype)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, heads, N, dtype=torch.float32, device=q.device)
        strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]  # from sample to sample, token to token
        forward_kernel[triton.cdiv(N, options["block_n"]), heads, B](
            q, k, v, out, lse, *strides, N, M, math.log2(math.e) / math.sqrt(d), d, D, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        (B, heads, N), M, d = lse.shape, k.shape[1], q.shape[-1] // lse.shape[1]
        D, _, options = launch_options(d, M, q.dtype)
        blocks_n, blocks_m = triton.cdiv(N, options["block_n"]), triton.cdiv(M, options["block_m"])
        d_out, dq, dk, dv = d_out.contiguous(), None, None, None
        delta = reduce(out.float() * d_out, "b n (h d) -> b h n", "sum", h=heads).contiguous()
        inputs = q, k, v, d_out, lse, delta
        strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
        numbers = 1 / math.sqrt(d), math.log2(math.e) / math.sqrt(d), d, D

        if ctx.needs_input_grad[0]:
            dq = torch.empty_like(out)
            dq_kernel[blocks_n, heads, B](*inputs, dq, *strides, N, M, *numbers, **options)

        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # A cross-attention has few blocks of keys, each with all queries to loop over. So the queries are split
            # over programs until there are enough programs. Their sums are added up afterwards.
            wanted = max(1, PROGRAMS // (blocks_m * heads * B))
            q_split = triton.cdiv(blocks_n, wanted) * options["block_n"]
            splits = triton.cdiv(N, q_split)
            sums = torch.empty(2, splits, *k.shape, dtype=torch.float32 if splits > 1 else k.dtype, device=k.device)
            dkv_kernel[blocks_m * splits, heads, B](*inputs, *sums, *strides, N, M, q_split, *numbers, **options)
            dk, dv = sums.sum(1).to(k.dtype) if splits > 1 else sums[:, 0]
        return dq, dk, dv, None
