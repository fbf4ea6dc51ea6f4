"""Attention, once, for the UNet, the VAE and the CLIP towers.

A layer holds its projections under its checkpoint's own names (`to_q` or `q_proj`, …) and calls

    q, k, v = project(x, self.to_q, self.to_k, self.to_v)      # on a GPU one matrix product
    x = attend(q, k, v, heads)                                 # softmax(q kᵀ / √d) v

`plain_attention` is what is computed. On a GPU the UNet's attention runs in the kernels below, a flash attention
(Dao et al., arXiv 2205.14135 and 2307.08691), written in Triton, which comes with torch's CUDA build for Linux.
"""

from __future__ import annotations  # so that tl.constexpr below is not looked up where Triton is absent

import math
import os
from contextlib import suppress

import torch
import torch.nn.functional as F
from einops import rearrange

triton = None
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":  # elsewhere it costs 70 MB for nothing
    with suppress(ImportError):
        import triton
        import triton.language as tl


def project(x, *layers):
    """Apply several linear layers to one input: (B, N, C) -> one (B, N, C_i) per layer.

    For the kernels, which read slices in place, by a single matrix product. Its weights are joined on the fly, so that
    the layers stay ordinary ones, to train and to save; they agree on whether they have a bias. On a CPU that saves
    nothing, and the joined weights would be kept for the way back.
    """
    if not has_kernels(x.device):
        return [layer(x) for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


def attend(q, k, v, heads, causal=False, upcast=False):
    """Multi-head attention of q (B, N, heads·d) over k and v (B, M, heads·d) -> (B, N, heads·d).

    causal: token i sees tokens 0 … i (CLIP's text tower). upcast: compute in float32 whatever came in
    (the scores of SD 2.1 overflow float16).
    """
    # Float32 stays with torch: the kernels would compute it exactly, but without the GPU's matrix units.
    if has_kernels(q.device) and q.dtype.itemsize == 2 and q.shape[-1] // heads <= MAX_HEAD_SIZE and not causal:
        return FlashAttention.apply(q, k, v, heads)  # its scores are float32 always: `upcast` asks for nothing more
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(x, "b h n d -> b n (h d)").to(dtype)


def plain_attention(q, k, v, heads):
    """The formula, as a reference: q (B, N, heads·d), k and v (B, M, heads·d) -> (B, N, heads·d)."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, N, M)
    weights = scores.softmax(dim=-1)
    return rearrange(weights @ v, "b h n d -> b n (h d)")


# ── Flash attention: the same, and its gradient, without ever storing the (N, M) scores ──────────────────────────────
#
# A program (one cell of a kernel's grid; all run at once) owns a block of one head's queries, loops over blocks of
# the keys, and has the scores of one block pair at a time, in registers. What a softmax needs of all the keys at once,
# its maximum and its sum, it corrects as it goes. Of those only log Σ exp(score) is kept, N numbers per head, from
# which the way back computes the weights again.
#
# Each program finds its head's d channels in the rows of (B, N, heads·d) tensors, so nothing is transposed or copied,
# not even where q, k and v are slices of one projection.
#
# Blocks measure a power of two: rows beyond the last and channels beyond d are read as zeros and not written.
# Products sum in float32. "ieee" keeps those of float32 inputs float32 as well, where the default is TF32, with an
# error of 1e-3; it has no effect on half precision. Exponentials and logarithms are to base 2, which is what the
# hardware has, so `scale2` = log₂(e) / √d.
#
# In comments: N queries, M keys; n and m of them in a block; D is d padded to a power of two.

MAX_HEAD_SIZE = 160  # SD 1.x has 40, 80 and 160, SD 2.x 64. Blocks of the VAE's 512 do not fit.


def has_kernels(device):
    """Whether the kernels below can run on `device`.

    They want an NVIDIA GPU of 2020 or later, for its bfloat16 and its shared memory, and start on the current one.
    """
    if triton is None or torch.version.cuda is None or device.type != "cuda":
        return False
    return device.index == torch.cuda.current_device() and torch.cuda.get_device_properties(device).major >= 8


def kernel(function):
    return triton.jit(function) if triton else function


@kernel
def load(x, rows, n_rows, stride, d: tl.constexpr, D: tl.constexpr):
    """Rows `rows` (n,) of one head, which starts at x and has n_rows rows `stride` apart -> (n, D)."""
    channels = tl.arange(0, D)
    inside = (rows < n_rows)[:, None] & (channels < d)[None, :]
    return tl.load(x + rows[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@kernel
def store(x, block, rows, n_rows, stride, d: tl.constexpr, D: tl.constexpr):
    """The reverse of `load`, and to x's dtype."""
    channels = tl.arange(0, D)
    inside = (rows < n_rows)[:, None] & (channels < d)[None, :]
    tl.store(x + rows[:, None] * stride + channels[None, :], block, mask=inside)


@kernel
def dot(a, b, total=None):
    """total + a b, summed in float32."""
    return tl.dot(a, b, total, input_precision="ieee")


@kernel
def forward_kernel(q, k, v, out, lse, q_b, q_n, k_b, k_n, v_b, v_n, N, M, scale2,
                   d: tl.constexpr, D: tl.constexpr, block_n: tl.constexpr, block_m: tl.constexpr):  # fmt: skip
    """out (B, N, heads·d), and lse (B, heads, N): log₂ Σ 2^(scale2 q·k).

    q_b and q_n are q's strides from sample to sample and from token to token; k's and v's likewise.
    Grid: blocks of queries, heads, B.
    """
    h, heads = tl.program_id(1), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)  # a batch may have more than 2³¹ elements, one sample has not
    q += b * q_b + h * d
    k += b * k_b + h * d
    v += b * v_b + h * d
    out += b * N * heads * d + h * d
    lse += (b * heads + h) * N

    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)
    q_block = load(q, rows, N, q_n, d, D)  # (n, D)
    highest = tl.full([block_n], float("-inf"), tl.float32)  # score so far
    total = tl.zeros([block_n], tl.float32)  # Σ 2^(score − highest)
    summed = tl.zeros([block_n, D], tl.float32)  # Σ 2^(score − highest) v
    for start in range(0, M, block_m):  # once where they fit, as a text's 77 do up to D = 128
        keys = start + tl.arange(0, block_m)
        scores = dot(q_block, tl.trans(load(k, keys, M, k_n, d, D))) * scale2  # (n, m)
        scores = tl.where((keys < M)[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - new_highest[:, None])  # at most 1, so float16 holds it
        correction = tl.exp2(highest - new_highest)  # of what was summed under the old one; 0 at first
        total = total * correction + tl.sum(p, 1)
        v_block = load(v, keys, M, v_n, d, D)
        summed = dot(p.to(v_block.dtype), v_block, summed * correction[:, None])
        highest = new_highest
    store(out, summed / total[:, None], rows, N, heads * d, d, D)
    tl.store(lse + rows, highest + tl.log2(total), mask=rows < N)


# The way back, with P the (N, M) weights and dP = dO Vᵀ the gradient that reaches them:
#
#     dV = Pᵀ dO      dS = P ∘ (dP − δ)      dQ = dS K / √d      dK = dSᵀ Q / √d
#
# The softmax's δ is Σ P ∘ dP over the keys, for each query one number, and that is the same as Σ dO ∘ O over the
# channels, which needs no P.


@kernel
def delta_kernel(out, d_out, delta, N, d: tl.constexpr, D: tl.constexpr, block_n: tl.constexpr):
    """out and d_out (B, N, heads·d) -> δ (B, heads, N). Grid: blocks of queries, heads, B."""
    h, heads = tl.program_id(1), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    head = b * N * heads * d + h * d
    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)
    out_block = load(out + head, rows, N, heads * d, d, D).to(tl.float32)
    d_out_block = load(d_out + head, rows, N, heads * d, d, D).to(tl.float32)
    tl.store(delta + (b * heads + h) * N + rows, tl.sum(out_block * d_out_block, 1), mask=rows < N)


@kernel
def dq_kernel(q, k, v, d_out, lse, delta, dq, q_b, q_n, k_b, k_n, v_b, v_n, N, M, scale, scale2,
              d: tl.constexpr, D: tl.constexpr, block_n: tl.constexpr, block_m: tl.constexpr):  # fmt: skip
    """dq (B, N, heads·d): a program has a block of queries and loops over the keys. Grid: as `forward_kernel`."""
    h, heads = tl.program_id(1), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    head = b * N * heads * d + h * d
    q += b * q_b + h * d
    k += b * k_b + h * d
    v += b * v_b + h * d

    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)
    q_block = load(q, rows, N, q_n, d, D)  # (n, D)
    d_out_block = load(d_out + head, rows, N, heads * d, d, D)
    lse_block = tl.load(lse + (b * heads + h) * N + rows, mask=rows < N, other=0.0)
    delta_block = tl.load(delta + (b * heads + h) * N + rows, mask=rows < N, other=0.0)
    summed = tl.zeros([block_n, D], tl.float32)
    for start in range(0, M, block_m):
        keys = start + tl.arange(0, block_m)
        k_block = load(k, keys, M, k_n, d, D)  # (m, D)
        v_block = load(v, keys, M, v_n, d, D)
        p = tl.exp2(dot(q_block, tl.trans(k_block)) * scale2 - lse_block[:, None])  # (n, m)
        p = tl.where((keys < M)[None, :], p, 0.0)  # a key of zeros may have 2^−lse = ∞, and ∞ · 0 is no number
        ds = p * (dot(d_out_block, tl.trans(v_block)) - delta_block[:, None])
        summed = dot(ds.to(k_block.dtype), k_block, summed)
    store(dq + head, summed * scale, rows, N, heads * d, d, D)


@kernel
def dkv_kernel(q, k, v, d_out, lse, delta, dk, dv, q_b, q_n, k_b, k_n, v_b, v_n, N, M, share, scale, scale2,
               d: tl.constexpr, D: tl.constexpr, block_n: tl.constexpr, block_m: tl.constexpr):  # fmt: skip
    """dk and dv (shares, B, M, heads·d): a program has a block of keys and loops over a share of the queries.

    Grid: blocks of keys × shares, heads, B. Rows beyond M may come to ∞ here, but stay in their rows, unwritten.
    """
    blocks = tl.cdiv(M, block_m)
    i, which = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    h, heads = tl.program_id(1), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    q += b * q_b + h * d
    k += b * k_b + h * d
    v += b * v_b + h * d
    d_out += b * N * heads * d + h * d
    lse += (b * heads + h) * N
    delta += (b * heads + h) * N
    head = (which * tl.num_programs(2) + b) * M * heads * d + h * d

    keys = i * block_m + tl.arange(0, block_m)
    k_block = load(k, keys, M, k_n, d, D)  # (m, D)
    v_block = load(v, keys, M, v_n, d, D)
    dk_sum = tl.zeros([block_m, D], tl.float32)
    dv_sum = tl.zeros([block_m, D], tl.float32)
    for start in range(which * share, tl.minimum(which * share + share, N), block_n):
        rows = start + tl.arange(0, block_n)
        q_block = load(q, rows, N, q_n, d, D)  # (n, D)
        d_out_block = load(d_out, rows, N, heads * d, d, D)
        lse_block = tl.load(lse + rows, mask=rows < N, other=0.0)
        delta_block = tl.load(delta + rows, mask=rows < N, other=0.0)
        p = tl.exp2(dot(k_block, tl.trans(q_block)) * scale2 - lse_block[None, :])  # (m, n): Pᵀ
        dv_sum = dot(p.to(d_out_block.dtype), d_out_block, dv_sum)
        ds = p * (dot(v_block, tl.trans(d_out_block)) - delta_block[None, :])  # (m, n): dSᵀ
        dk_sum = dot(ds.to(q_block.dtype), q_block, dk_sum)
    store(dk + head, dk_sum * scale, keys, M, heads * d, d, D)
    store(dv + head, dv_sum, keys, M, heads * d, d, D)


# How a kernel is launched, by D: (block_n, block_m, warps, stages). The larger the blocks, the more often a value is
# used once it is read, until the scores and the sums no longer fit in a thread's 255 registers, or the blocks in the
# 99 KB of shared memory that every GPU since 2020 has. "warps" of 32 threads share a block; "stages" blocks are on
# their way from memory at a time. Chosen by what the compiler reports, not yet by timing: see bench.py.
FORWARD = {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}
BACKWARD = {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)}
FORWARD_ONE_BLOCK = {64: (64, 128, 4, 1), 128: (64, 128, 8, 1)}  # for at most 128 keys
FLOAT32 = (16, 16, 4, 1)  # twice the bytes, and products without the matrix units need many more registers

PROGRAMS = 256  # that keep a GPU busy: about two for each of an H100's 132 processors


def launch_options(d, M, dtype):
    """-> D, and two dictionaries: options of the forward and of the backward kernels."""
    D = max(64, triton.next_power_of_2(d))
    short = FORWARD_ONE_BLOCK if M <= 128 else {}
    options = [short.get(D, FORWARD[D]), BACKWARD[D]] if dtype.itemsize == 2 else [FLOAT32, FLOAT32]
    return D, *(dict(zip(("block_n", "block_m", "num_warps", "num_stages"), values)) for values in options)


class FlashAttention(torch.autograd.Function):
    """`plain_attention` by the kernels. Nothing here waits for the GPU, so that a CUDA graph can hold it."""

    @staticmethod
    def forward(ctx, q, k, v, heads):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        B, N, channels = q.shape
        M, d = k.shape[1], channels // heads
        D, options, _ = launch_options(d, M, q.dtype)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, heads, N, dtype=torch.float32, device=q.device)
        forward_kernel[triton.cdiv(N, options["block_n"]), heads, B](
            q, k, v, out, lse, *strides(q, k, v), N, M, math.log2(math.e) / math.sqrt(d), d, D, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        (B, heads, N), M, d = lse.shape, k.shape[1], q.shape[-1] // lse.shape[1]
        D, _, options = launch_options(d, M, q.dtype)
        blocks_n, blocks_m = triton.cdiv(N, options["block_n"]), triton.cdiv(M, options["block_m"])
        d_out, delta, dq, dk, dv = d_out.contiguous(), torch.empty_like(lse), None, None, None
        delta_kernel[blocks_n, heads, B](out, d_out, delta, N, d, D, options["block_n"])
        inputs = q, k, v, d_out, lse, delta
        numbers = 1 / math.sqrt(d), math.log2(math.e) / math.sqrt(d), d, D

        if ctx.needs_input_grad[0]:
            dq = torch.empty_like(out)
            dq_kernel[blocks_n, heads, B](*inputs, dq, *strides(q, k, v), N, M, *numbers, **options)

        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # The keys of a cross-attention make few blocks, each with all the queries to go through. Until there are
            # enough programs, the queries are dealt out to several, and their sums added up afterwards.
            wanted = max(1, PROGRAMS // (blocks_m * heads * B))
            share = triton.cdiv(blocks_n, wanted) * options["block_n"]
            shares = triton.cdiv(N, share)
            sums = torch.empty(2, shares, *k.shape, dtype=torch.float32 if shares > 1 else k.dtype, device=k.device)
            dkv_kernel[blocks_m * shares, heads, B](
                *inputs, *sums, *strides(q, k, v), N, M, share, *numbers, **options)
            dk, dv = sums.sum(1).to(k.dtype) if shares > 1 else sums[:, 0]
        return dq, dk, dv, None


def strides(*tensors):
    """From sample to sample and from token to token, for each (B, N, C) tensor in turn."""
    return [stride for x in tensors for stride in x.stride()[:2]]
