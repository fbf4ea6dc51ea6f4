"""Attention, once, for the UNet, the VAE and the CLIP towers.

A layer holds its projections under its checkpoint's own names (`to_q` or `q_proj`, …) and calls

    q, k, v = project(x, self.to_q, self.to_k, self.to_v)      # one matrix product
    x = attend(q, k, v, heads)                                 # softmax(q kᵀ / √d) v
"""

import torch
import torch.nn.functional as F
from einops import rearrange


def project(x, *layers):
    """Apply several linear layers to one input as a single matrix product: (B, N, C) -> one (B, N, C_i) per layer.

    The layers agree on whether they have a bias. The weights are joined on the fly, so that
    the layers stay ordinary ones, to train and to save. On two CPU cores that is no slower than three products
    for 4096 tokens of width 320, and 7 % slower for 256 of width 1280.
    """
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


def attend(q, k, v, heads, causal=False, upcast=False):
    """Multi-head attention of q (B, N, heads·d) over k and v (B, M, heads·d) -> (B, N, heads·d).

    causal: token i sees tokens 0 … i (CLIP's text tower). upcast: compute in float32 whatever came in
    (the scores of SD 2.1 overflow float16).
    """
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(x, "b h n d -> b n (h d)").to(dtype)
