"""The Stable Diffusion UNet: predicts the noise eps (or v) in a noisy latent, given the timestep and the context.

    x_t (B, 4, 64, 64) ── conv_in ── down ── down ── down ── down ──┐
                                      │       │       │       │    mid
    eps (B, 4, 64, 64) ── conv_out ── up ──── up ──── up ──── up ───┘
    channels:                        320     640    1280    1280

A level (down and up) is a row of residual blocks, conditioned on the timestep. A transformer follows each of them,
except at the lowest level; the mid block is residual block, transformer, residual block. A transformer cross-attends to
the context: the prompt embeddings and, in LiVO, the value tokens in front of them. Skip connections (│): each residual
block of the up path also reads one feature map of the down path, last in first out; conv_in's is the last.

SD 1.x and 2.x (arXiv 2112.10752) are two configurations of this one class. Attributes have the names of the published
(diffusers) checkpoints, so that weights load without renaming.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from attention import attend, project
from efficiency import Conv2d, gelu_gate, norm_silu  # nn.Conv2d, F.silu(norm(x)) and a * F.gelu(b) that store less


@dataclass
class UNetConfig:
    """Field names are those of `unet/config.json`; the defaults are SD 1.5."""

    sample_size: int = 64  # height and width of the latents in training
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"  # None in distilled models: there is no mid block
    layers_per_block: int = 2
    cross_attention_dim: int = 768  # channels of the context: 1024 in SD 2.x
    attention_head_dim: int | tuple = 8  # the NUMBER of heads (diffusers issue 2011), per level: (5, 10, 20, 20) in 2.x
    use_linear_projection: bool = False  # True in SD 2.x
    upcast_attention: bool = False  # True in SD 2.1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5


def timestep_embedding(t, channels):
    """Sinusoidal embedding of timesteps t (B,): cosines, then sines, of geometric frequencies. -> (B, channels)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # (B, channels / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions, residual: (B, C_in, H, W), time_emb (B, 4C) or, in the VAE, none -> (B, C_out, H, W)."""

    def __init__(self, c_in, c_out, time_channels=None, groups=32, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        if time_channels:
            self.time_emb_proj = nn.Linear(time_channels, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time_emb=None):
        h = self.conv1(norm_silu(self.norm1, x))
        if time_emb is not None:
            h = h + self.time_emb_proj(time_emb)[:, :, None, None]
        h = self.conv2(norm_silu(self.norm2, h))
        return self.conv_shortcut(x) + h


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, *size), by default (2h, 2w)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of image tokens x (B, N, C) over a context (B, L, D), or over themselves."""

    def __init__(self, channels, heads, context_channels=None, upcast=False):
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x, context=None):
        if context is None:
            q, k, v = project(x, self.to_q, self.to_k, self.to_v)  # (B, N, C) each
        else:
            q, (k, v) = self.to_q(x), project(context, self.to_k, self.to_v)  # (B, N, C), (B, L, C) twice
        return self.to_out(attend(q, k, v, self.heads, upcast=self.upcast))


class GEGLU(nn.Module):
    """Gated linear unit, arXiv 2002.05202: (B, N, C) -> (B, N, 4C)."""

    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)

    def forward(self, x):
        return gelu_gate(self.proj(x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward: x (B, N, C), context (B, L, D) -> (B, N, C)."""

    def __init__(self, channels, heads, context_channels, upcast):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels, upcast)
        self.norm3 = nn.LayerNorm(channels)
        # Identity: the place of a dropout in the checkpoint's numbering, with rate 0 in Stable Diffusion
        net = nn.Sequential(GEGLU(channels), nn.Identity(), nn.Linear(4 * channels, channels))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block on the pixels of a feature map, with a residual connection: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, heads, config):
        super().__init__()
        self.linear = config.use_linear_projection  # else the projections are 1×1 convolutions
        projection = nn.Linear if self.linear else partial(Conv2d, kernel_size=1)
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        block = TransformerBlock(channels, heads, config.cross_attention_dim, config.upcast_attention)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = projection(channels, channels)

    def forward(self, x, context):
        height = x.shape[-2]
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        h = h if self.linear else self.proj_out(h)
        return x + h


class Block(nn.Module):
    """One level: a residual block for each of `channels_in`, each followed by a transformer if there are `heads`."""

    def __init__(self, channels_in, channels, config, heads=None, downsample=False, upsample=False):
        super().__init__()
        time_channels, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in, channels, time_channels, groups, config.norm_eps) for c_in in channels_in)
        if heads:
            self.attentions = nn.ModuleList(SpatialTransformer(channels, heads, config) for _ in channels_in)
        if downsample:
            conv = Conv2d(channels, channels, 3, stride=2, padding=1)
            self.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": conv})])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(channels)])

    def layer(self, i, x, time_emb, context):
        x = self.resnets[i](x, time_emb)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class DownBlock(Block):
    def forward(self, x, time_emb, context):
        """(B, C_in, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉), at the lowest level (B, C, H, W), and all its feature maps."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time_emb, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0].conv(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, channels, heads, config):
        super().__init__()
        time_channels, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, time_channels, groups, config.norm_eps) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(channels, heads, config)])

    def forward(self, x, time_emb, context):
        x = self.resnets[0](x, time_emb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time_emb)


class UpBlock(Block):
    def forward(self, x, time_emb, context, skips):
        """(B, C_in, h, w) -> (B, C, size of the next skip), at the highest level (B, C, h, w).

        Each residual block pops one skip.
        """
        for i in range(len(self.resnets)):
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.layer(i, x, time_emb, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, size=skips[-1].shape[-2:])  # the down path rounded odd sizes up
        return x


class UNet(nn.Module):
    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        channels, n = config.block_out_channels, config.layers_per_block
        last = len(channels) - 1
        heads = config.attention_head_dim
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        down_heads = [h if "CrossAttn" in kind else None for h, kind in zip(heads, config.down_block_types)]
        up_heads = [h if "CrossAttn" in kind else None for h, kind in zip(reversed(heads), config.up_block_types)]

        c, time_channels = channels[0], 4 * channels[0]
        self.time_embedding = nn.Sequential(OrderedDict(
            linear_1=nn.Linear(c, time_channels), act=nn.SiLU(), linear_2=nn.Linear(time_channels, time_channels)))
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)

        # A level has n residual blocks in the down path, n + 1 in the up path: one for each skip connection.
        self.down_blocks, skip_channels = nn.ModuleList(), [channels[0]]
        for i, c in enumerate(channels):
            channels_in = [skip_channels[-1]] + [c] * (n - 1)
            self.down_blocks.append(DownBlock(channels_in, c, config, down_heads[i], downsample=i < last))
            skip_channels += [c] * (n + 1 if i < last else n)

        self.mid_block = MidBlock(channels[-1], heads[-1], config) if config.mid_block_type else None
        self.up_blocks, previous = nn.ModuleList(), channels[-1]
        for i, c in enumerate(reversed(channels)):
            channels_in = [c_x + skip_channels.pop() for c_x in [previous] + [c] * n]
            self.up_blocks.append(UpBlock(channels_in, c, config, up_heads[i], upsample=i < last))
            previous = c
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1)

    def embed(self, t):
        """Timesteps (B,) -> their embeddings (B, 4C). A sampler computes them once for all its steps."""
        sinusoids = timestep_embedding(t, self.config.block_out_channels[0])  # (B, C)
        return F.silu(self.time_embedding(sinusoids.to(self.conv_in.weight.dtype)))

    def forward(self, x, t, context):
        """Noisy latents x (B, 4, H, W), timesteps t (B,), one for all or `embed(t)`, context (B, L, D) -> eps or v."""
        t = torch.as_tensor(t, device=x.device)
        time_emb = t if t.dim() == 2 else self.embed(t.reshape(-1))  # (B, 4C) or (1, 4C)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, time_emb, context)
            skips += block_skips
        x = self.mid_block(x, time_emb, context) if self.mid_block else x
        for block in self.up_blocks:
            x = block(x, time_emb, context, skips)
        return self.conv_out(norm_silu(self.conv_norm_out, x))
