"""What saves memory or time, without effect beyond rounding (DeepCache has one, and is off by default); device, dtype.

Skip it at first reading.

LiVO trains through a frozen UNet: gradients pass every layer on their way to the value token, but no weight of the
UNet needs one. So its layers can store fewer activations for the backward pass than those of plain PyTorch.
"""

import contextlib
import ctypes
import os
import subprocess
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import UserError

# UNet channels from which bfloat16 (1.15 times at 160, 0.7 at 64) and channels last (1.07 at 320) are faster on a CPU.
WIDE = 160


def norm_silu(norm, x):
    """F.silu(norm(x))."""
    return recompute(lambda x: F.silu(norm(x)), x)


def gelu_gate(x):
    """The first half of the channels times the GELU of the second: (B, N, 2C) -> (B, N, C)."""

    def gate(x):
        a, b = x.chunk(2, dim=-1)
        return a * F.gelu(b)

    return recompute(gate, x)


def recompute(f, x):
    """Activation checkpointing for a cheap f with a large output: store only x, recompute f(x) in the backward pass."""
    # f has no dropout, so no random state is kept. A CUDA graph could not read one.
    return checkpoint(f, x, use_reentrant=False, preserve_rng_state=False) if x.requires_grad else f(x)


def checkpoint_layers(network, kinds):
    """Activation checkpointing for all layers of these classes: they store only their inputs."""
    for layer in network.modules():
        if isinstance(layer, kinds):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


class Conv2d(nn.Conv2d):
    """nn.Conv2d that does not store its input while its weight is frozen: a seventh of a UNet's activations."""

    def forward(self, x):
        if x.requires_grad and not self.weight.requires_grad:
            return FrozenConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


class FrozenConvolution(torch.autograd.Function):
    """A convolution with a gradient for its input alone. Only the weight's gradient would need the input."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, d_out):
        weight, = ctx.saved_tensors
        return torch.nn.grad.conv2d_input(ctx.shape, weight, d_out, ctx.stride, ctx.padding), None, None, None, None


def with_context(unet, context, latents):
    """The UNet with a fixed context, (x, time_emb) -> output. On a GPU it is a CUDA graph: one launch, not a thousand.

    context: (B, L, D), to be kept while the graph is used, which reads its memory. latents: (b, 4, h, w), for their
    size and device; x will have B rows.
    """

    def model(x, time_emb):
        return unet(x, time_emb, context)

    if not latents.is_cuda:
        return model
    time_emb = unet.embed(torch.zeros(1, device=latents.device))
    x = torch.zeros(len(context), *latents.shape[1:], dtype=time_emb.dtype, device=latents.device)
    return torch.cuda.make_graphed_callables(model, (x, time_emb))


def with_cached_depth(unet, context, every):
    """`with_context` with DeepCache, arXiv 2312.00858: only every `every`-th call computes the lower resolutions.

    The calls between them compute the highest resolution alone, on the last output of the lower ones. The images
    differ a little; with 1 they do not.
    """
    calls, up = 0, None

    def model(x, time_emb):
        nonlocal calls, up
        (first, *down_blocks), (*up_blocks, last) = unet.down_blocks, unet.up_blocks
        x = unet.conv_in(x)
        h, skips = first(x, time_emb, context)
        skips, shallow = [x, *skips], len(last.resnets)  # the last up block pops the first skips
        if calls % every == 0:
            for block in down_blocks:
                h, block_skips = block(h, time_emb, context)
                skips += block_skips
            h = unet.mid_block(h, time_emb, context) if unet.mid_block else h
            for block in up_blocks:
                h = block(h, time_emb, context, skips)
            up = h
        calls += 1
        return unet.conv_out(norm_silu(unet.conv_norm_out, last(up, time_emb, context, skips[:shallow])))

    return model


def compile_unet(unet):
    """torch.compile, which fuses operations. Raises UserError if there is no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    try:
        subprocess.run([compiler, "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--compile: expected a C++ compiler, got {compiler}: {error}") from error
    unet.compile()


def keep_freed_memory(large=False):
    """Let glibc's malloc reuse freed blocks instead of returning them to the system, which clears every page again.

    On a CPU that halves the time of a layer whose output takes tens of megabytes. Blocks above 32 MB, glibc's limit,
    are still returned unless `large`: they would fragment the peak of a VAE, but the backward pass of a full-size UNet
    is faster with them.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
    with contextlib.suppress(AttributeError, TypeError):  # another C library, another system
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # what loading has left
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if large:
            libc.mallopt(M_MMAP_MAX, 0)


# ── Device and dtype ─────────────────────────────────────────────────────────────────────────────────────────────────

def add_device_options(parser, default="fp16 on CUDA, else fp32"):
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="",
                        help=f"auto is the fastest, on some CPUs bf16 for a full-size model (default: {default})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")


def pick_device(name, dtype):
    """The options --device and --dtype -> torch.device, torch.dtype (None for "auto": the model decides too).

    Under torchrun each process of a machine gets a GPU of its own. Raises UserError for a device that is not there.
    """
    try:
        if name in ("auto", "cuda") and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        else:
            device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where the kernels of attention.py start
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:  # torch raises nothing narrower
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device: expected auto, cpu, cuda, …, got {name}: {reason}") from error
    dtype = dtype or ("fp16" if device.type == "cuda" else "fp32")
    return device, {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def fastest_dtype(device, unet=None):
    """float16 on a GPU; bfloat16 on a CPU with instructions for it, if the UNet (a config) is wide; else float32."""
    if device.type == "cuda":
        return torch.float16
    able = device.type == "cpu" and any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16")))
    return torch.bfloat16 if able and (unet is None or unet.block_out_channels[0] >= WIDE) else torch.float32
