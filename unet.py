"""The Stable Diffusion UNet: predicts the noise (or v) in a latent, given the time and a text.

    latent ─ conv_in ─ down ─ down ─ down ─ down ─┐
                        │skips  │      │      │    mid
    noise ─ conv_out ── up ─── up ──── up ─── up ──┘

Every "down" and "up" is a row of residual blocks; those at the higher resolutions are each followed by a
transformer that looks at the text. SD 1.x and 2.x are two configurations of this one class. Attributes carry
the names of the published (diffusers) checkpoints, so that weights load with no renaming.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import attend, project


@dataclass
class UNetConfig:
    """Field names are those of `unet/config.json`; the defaults are SD 1.5."""

    sample_size: int = 64  # latent height and width the model was trained at
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    cross_attention_dim: int = 768  # width of the text tower: 1024 in SD 2.x
    # The NUMBER of heads, per level: (5, 10, 20, 20) in SD 2.x. The misnomer is the published files'
    # (huggingface/diffusers issue 2011).
    attention_head_dim: int | tuple = 8
    use_linear_projection: bool = False  # True in SD 2.x
    upcast_attention: bool = False  # True in SD 2.1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5


def timestep_embedding(t, channels):
    """Times t (B,) of 0 … 999 -> (B, channels): cosines, then sines, of geometrically spaced frequencies."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # (B, channels / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """An MLP on the sinusoids: (B, C) -> (B, 4C)."""

    def __init__(self, channels, time_channels):
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class FrozenConvolution(torch.autograd.Function):
    """The convolution of a weight that is not trained. torch's own keeps x, which only the weight's gradient would
    need; without, a UNet keeps a seventh less for the way back."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, d_out):
        weight, = ctx.saved_tensors
        return torch.nn.grad.conv2d_input(ctx.shape, weight, d_out, ctx.stride, ctx.padding), None, None, None, None


class Conv2d(nn.Conv2d):
    def forward(self, x):
        if x.requires_grad and not self.weight.requires_grad:
            return FrozenConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


def recomputed(f, x):
    """f(x), of which only x is kept for the way back, where f is computed again: f is cheap, its output large."""
    return checkpoint(f, x, use_reentrant=False, preserve_rng_state=False) if x.requires_grad else f(x)


def as_many(x, like):
    """x (B, …) over and over until it has as many rows as `like`: (n·B, …)."""
    n = like.shape[0] // x.shape[0]
    return torch.cat([x] * n) if n > 1 else x


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions around the time, beside a shortcut: (B, C_in, H, W) -> (B, C_out, H, W).

    time: (B, 4C), or (1, 4C) for all. The VAE has none.
    """

    def __init__(self, c_in, c_out, time_channels=None, groups=32, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        if time_channels:
            self.time_emb_proj = nn.Linear(time_channels, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time=None):
        h = self.conv1(recomputed(lambda x: F.silu(self.norm1(x)), x))
        if time is not None:
            h = h + as_many(self.time_emb_proj(time), h)[:, :, None, None]
        h = self.conv2(recomputed(lambda x: F.silu(self.norm2(x)), h))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, *size), twice as large unless told otherwise."""

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of image tokens x (B, N, C): over themselves, or over a context (B, L, D)."""

    def __init__(self, channels, heads, context_channels=None, upcast=False):
        super().__init__()
        self.heads, self.upcast, self.is_cross = heads, upcast, context_channels is not None
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def keys_values(self, context):
        return project(context, self.to_k, self.to_v)  # (B, L, C) each

    def forward(self, x, keys_values=None):
        if self.is_cross:
            q, (k, v) = self.to_q(x), keys_values
        else:
            q, k, v = project(x, self.to_q, self.to_k, self.to_v)
        return self.to_out(attend(q, k, v, self.heads, upcast=self.upcast))


class GEGLU(nn.Module):
    """(B, N, C) -> (B, N, 4C), gated."""

    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)

    @staticmethod
    def gated(x):
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)

    def forward(self, x):
        return recomputed(self.gated, self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        # the checkpoint counts a dropout between the two, which is 0 in every Stable Diffusion
        self.net = nn.Sequential(GEGLU(channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Image tokens (B, N, C) look at each other, at the text, and then each at itself.

    With n texts for each image, the ways of the n part where they first look at them: (n·B, N, C).
    """

    def __init__(self, channels, heads, context_channels, upcast):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels, upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x, context):
        keys, values = context[self.attn2]
        x = x + self.attn1(self.norm1(x))
        x = as_many(x, keys)
        x = x + self.attn2(self.norm2(x), (keys, values))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block on the pixels of a feature map, residual: (B, C, H, W) -> (n·B, C, H, W), n = 1 where
    their ways have parted before."""

    def __init__(self, channels, heads, config):
        super().__init__()
        self.linear = config.use_linear_projection
        projection = nn.Linear if self.linear else lambda c_in, c_out: Conv2d(c_in, c_out, 1)
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        block = TransformerBlock(channels, heads, config.cross_attention_dim, config.upcast_attention)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = projection(channels, channels)

    def forward(self, x, context):
        height, width = x.shape[-2:]
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height, w=width)
        h = h if self.linear else self.proj_out(h)
        return as_many(x, h) + h


class Block(nn.Module):
    """One level of the UNet, on the way down or up: residual blocks, a transformer after each where the
    level attends to the text, and a change of resolution at the end."""

    def __init__(self, channels_in, channels, config, heads=None, downsample=False, upsample=False):
        super().__init__()
        time_channels, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in, channels, time_channels, groups, config.norm_eps) for c_in in channels_in
        )
        if heads:
            self.attentions = nn.ModuleList(SpatialTransformer(channels, heads, config) for _ in channels_in)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(channels)])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(channels)])

    def layer(self, i, x, time, context):
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class DownBlock(Block):
    def forward(self, x, time, context):
        """(B, C_in, H, W) -> (B, C, H/2, W/2), and every intermediate map for the way up."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, channels, heads, config):
        super().__init__()
        time_channels, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, time_channels, groups, config.norm_eps) for _ in range(2)
        )
        self.attentions = nn.ModuleList([SpatialTransformer(channels, heads, config)])

    def forward(self, x, time, context):
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UpBlock(Block):
    def forward(self, x, time, context, skips):
        """Takes its share of `skips` off the end. (B, C_in, h, w) -> (B, C, 2h, 2w)."""
        for i in range(len(self.resnets)):
            x = torch.cat([x, as_many(skips.pop(), x)], dim=1)
            x = self.layer(i, x, time, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, size=skips[-1].shape[-2:])  # odd sizes were rounded up on the way down
        return x


class UNet(nn.Module):
    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        levels, n = len(channels), config.layers_per_block
        heads = config.attention_head_dim
        heads = (heads,) * levels if isinstance(heads, int) else tuple(heads)
        attends_down = [kind == "CrossAttnDownBlock2D" for kind in config.down_block_types]
        attends_up = [kind == "CrossAttnUpBlock2D" for kind in config.up_block_types]

        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]  # of every map that the way down leaves for the way up
        for i, c in enumerate(channels):
            last = i == levels - 1
            inputs = [skip_channels[-1]] + [c] * (n - 1)
            self.down_blocks.append(
                DownBlock(inputs, c, config, heads[i] if attends_down[i] else None, downsample=not last)
            )
            skip_channels += [c] * (n if last else n + 1)

        self.mid_block = MidBlock(channels[-1], heads[-1], config)

        self.up_blocks = nn.ModuleList()
        previous = channels[-1]
        for i, c in enumerate(reversed(channels)):
            inputs = [previous + skip_channels.pop()] + [c + skip_channels.pop() for _ in range(n)]
            self.up_blocks.append(
                UpBlock(inputs, c, config, heads[-1 - i] if attends_up[i] else None, upsample=i < levels - 1)
            )
            previous = c

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1)

    def keys_values(self, context):
        """What every cross-attention will want of a context (B, L, D). Fixed while the context is, so that a
        sampler computes it once and hands it to `forward` at every step."""
        crosses = [m for m in self.modules() if isinstance(m, Attention) and m.is_cross]
        return {attention: attention.keys_values(context) for attention in crosses}

    def embed(self, t):
        """Times (B,) -> (B, 4C), as every residual block wants them. A sampler knows them before its first step."""
        sinusoids = timestep_embedding(t, self.config.block_out_channels[0])
        return F.silu(self.time_embedding(sinusoids.to(self.conv_in.weight.dtype)))

    def forward(self, x, t, context):
        """x (B, 4, H, W) latents · t (B,) or scalar times, or `embed` of them · context (n·B, L, D), or `keys_values`
        of it -> (n·B, 4, H, W), the noise or v.

        Row i of x goes with rows i, B + i, … of the context: what comes before the first look at the text is
        computed once for the n of them.
        """
        if isinstance(context, torch.Tensor):
            context = self.keys_values(context)
        t = torch.as_tensor(t, device=x.device)
        time = t if t.dim() == 2 else self.embed(t.reshape(-1))  # (B, 4C), or (1, 4C) for all

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, time, context)
            skips += block_skips
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, time, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
