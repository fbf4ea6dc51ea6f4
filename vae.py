"""AutoencoderKL: images to latents of an eighth of their size, and back (arXiv 2112.10752).

    image (B, 3, H, W) in [-1, 1] ── encoder ── quant_conv ──→ mean, log-variance (B, 4, H/8, W/8)
    image (B, 3, H, W) ←── decoder ── post_quant_conv ── latent (B, 4, H/8, W/8)

Attributes have the names of the published (diffusers) checkpoints. `encode` multiplies by the scaling factor and
`decode` divides by it, so latents have about unit variance. In float16 activations of the published weights may
overflow, which gives black images; bfloat16 has float32's range.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from attention import attend, project
from unet import ResnetBlock, Upsample

NORM_EPS = 1e-6  # 1e-5 in the UNet's residual blocks


@dataclass
class VAEConfig:
    """Field names are those of `vae/config.json`; the defaults are SD 1.x and 2.x."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def factor(self):
        """Pixels per latent pixel, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


class PixelAttention(nn.Module):
    """Single-head self-attention over all pixels, residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        h = self.to_out(attend(*project(h, self.to_q, self.to_k, self.to_v), heads=1))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[-2])


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=NORM_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Block(nn.Module):
    """`layers` residual blocks at one resolution, then a change of resolution unless it is the last."""

    def __init__(self, c_in, c_out, layers, groups, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(*widths, groups=groups, eps=NORM_EPS) for widths in pairwise([c_in] + [c_out] * layers))
        if downsample:  # unlike the UNet's, it pads at the bottom and on the right only
            pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c_out, c_out, 3, stride=2)
            self.downsamplers = nn.ModuleList([nn.Sequential(OrderedDict(pad=pad, conv=conv))])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for resample in [*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())]:
            x = resample(x)
        return x


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2·4, H/8, W/8)."""

    def __init__(self, config):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Block(*widths, config.layers_per_block, groups, downsample=i < len(channels) - 1)
            for i, widths in enumerate(pairwise(channels[:1] + channels)))
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """(B, 4, h, w) -> (B, 3, 8h, 8w)."""

    def __init__(self, config):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            Block(*widths, config.layers_per_block + 1, groups, upsample=i < len(channels) - 1)
            for i, widths in enumerate(pairwise(channels[:1] + channels)))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image):
        """image (B, 3, H, W) in [-1, 1] -> mean and log-variance of the scaled latent, (B, 4, h, w) each."""
        (mean, logvar), scale = self.quant_conv(self.encoder(image)).chunk(2, dim=1), self.config.scaling_factor
        return mean * scale, logvar.clamp(-30, 20) + 2 * math.log(scale)

    def decode(self, latent):
        """latent (B, 4, h, w) -> image (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latent / self.config.scaling_factor))
