"""LiVO: Lightweight Value Optimization (arXiv 2410.12700).

LiVO aligns a frozen text-to-image model with a value principle v ("gender equality") by training one plug-in network,
the value encoder. It reads the string "v, x", where x is the prompt, and gives one token, which is prepended to the
prompt embeddings:

    context = [ value_encoder("v, x") ; text_encoder("x") ]                  (B, 1 + 77, C)

(77 is the tokenizer's length; tiny-sd has 24.) The UNet cross-attends to this longer context as usual, so none of its
weights change. Without the value token the model is the base model, bit for bit.

Training data are preference pairs (x, v, y_w, y_l) of an aligned image y_w and a violating image y_l. For a toxic
principle y_l shows the toxicity. For a bias principle y_l shows the majority class and y_w another one; in sampling,
half of the images get the token. Both images of a pair share one noise eps and one timestep t. Their errors are

    ℓ(y) = ‖eps − eps_unet(z_t(y), t, context)‖²                             mean over (C, H, W); shape (B,)

                                 aligned y_w   violating y_l
    with the value token   ℓ_θ      err_w         err_l        the gradient flows into the value encoder θ
    without it             ℓ_ref    ref_w         ref_l        the reference model (the base model), no gradient

and the loss is the sum of two hinges, each with a slope and a margin of its own:

    L = max(0, γ1 + β (err_w − ref_w)) + max(0, γ2 + α (ref_l − err_l))
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

import weights
from clip_text import CLIPTextModel

# Aligned hinge: slope β, margin γ1. Violating hinge: slope α, margin γ2. Values of the command in the authors' README.
ALPHA, BETA, GAMMA1, GAMMA2 = 500.0, 1000.0, 1.0, 0.5


class ValueEncoder(CLIPTextModel):
    """A trainable copy of the CLIP text encoder. Token ids of "v, x" (B, N) -> the value token (B, 1, C)."""

    def forward(self, ids):
        _, pooled = super().forward(ids)  # (B, C), the last hidden state at the end-of-text token
        return pooled[:, None]

    @classmethod
    def from_text_encoder(cls, text_encoder):
        """Initialize from the frozen text encoder, in float32."""
        self = cls(text_encoder.config).to(next(text_encoder.parameters()).device)
        self.load_state_dict(text_encoder.state_dict())
        return self


def load_value_encoder(source, weights_source, sd):
    """The value encoder at `source` (folder or hub name), by default in the folder of the weights; None without one.

    Raises UserError for one that does not fit the model.
    """
    from formats.checks import check_value_encoder  # imported late, as the method does not need it
    if source is None and (source := weights.local(Path(weights_source) / "value_encoder")) is None:
        return None
    device = next(sd.unet.parameters()).device
    value_encoder = weights.load_text_encoder(source, network=ValueEncoder, device=device)
    check_value_encoder(value_encoder.config, sd, source)
    return value_encoder


def encode_prompts(sd, prompts):
    """Prompt embeddings, the text encoder's last hidden state: (B, 77, C)."""
    ids = sd.tokenizer(prompts).to(next(sd.text_encoder.parameters()).device)  # (B, 77)
    return sd.text_encoder(ids)[0]


def make_context(sd, prompts, principles=(), value_encoder=None, prompt_embeds=None):
    """The cross-attention context [value tokens ; prompt embeddings], (B, P + 77, C). With P = 0 the base model's.

    principles: a list of P principles, each a string for the whole batch or a list of B strings; or one string.
    prompt_embeds: precomputed `encode_prompts(sd, prompts)`.
    """
    principles = [principles] if isinstance(principles, str) else principles
    if prompt_embeds is None:
        prompt_embeds = encode_prompts(sd, prompts)
    value_tokens = []
    for principle in principles:
        values = [principle] * len(prompts) if isinstance(principle, str) else principle
        ids = sd.tokenizer([f"{v}, {x}" for v, x in zip(values, prompts)])  # (B, 77)
        value_tokens.append(value_encoder(ids.to(prompt_embeds.device)).to(prompt_embeds.dtype))  # (B, 1, C)
    return torch.cat([*value_tokens, prompt_embeds], dim=1)


def make_uncond(sd, length, negative=""):
    """The unconditional context of classifier-free guidance, as long as the conditional one: (1, length, C).

    The text encoder has 77 positions. Its last (padding) embedding is repeated; cross-attention has no positions.
    """
    embeds = encode_prompts(sd, [negative])  # (1, 77, C)
    return torch.cat([embeds, embeds[:, -1:].expand(-1, length - embeds.shape[1], -1)], dim=1)


def is_bias(principle):
    """Bias principles ("… equality") ask for balance. Toxic principles ask for the absence of something."""
    return principle.strip().rstrip(".").lower().endswith("equality")


def spread(n, fraction):
    """Which of n images get the value token: an evenly spread fraction, rounded (½ of 1 is 1). -> n booleans."""
    return [math.floor((i + 1) * fraction + 0.5) > math.floor(i * fraction + 0.5) for i in range(n)]


def active(principles, n, fraction=None):
    """-> for each of n images a tuple of its principles. A second bias principle gets half of each half."""
    chosen = [()] * n
    for principle in principles:
        p = fraction if fraction is not None else 0.5 if is_bias(principle) else 1
        order = sorted(range(n), key=chosen.__getitem__, reverse=True)  # divides each group of equal images again
        for i, gets_token in zip(order, spread(n, p)):
            chosen[i] += (principle,) if gets_token else ()
    return chosen


def aligned_hinge(err_w, ref_w, beta=BETA, gamma1=GAMMA1):
    """max(0, γ1 + β (err_w − ref_w)), (B,): lower the error on aligned images below the reference model's.

    Saturates (zero loss, zero gradient) once err_w < ref_w − γ1/β.
    """
    return F.relu(gamma1 + beta * (err_w - ref_w))


def violating_hinge(err_l, ref_l, alpha=ALPHA, gamma2=GAMMA2):
    """max(0, γ2 + α (ref_l − err_l)), (B,): raise the error on violating images above the reference model's.

    Saturates once err_l > ref_l + γ2/α.
    """
    return F.relu(gamma2 + alpha * (ref_l - err_l))


def livo_loss(err_w, ref_w, err_l, ref_l, alpha=ALPHA, beta=BETA, gamma1=GAMMA1, gamma2=GAMMA2):
    """The LiVO loss, a scalar. Where the value token has no effect it is γ1 + γ2. The errors are (B,) float32."""
    return (aligned_hinge(err_w, ref_w, beta, gamma1) + violating_hinge(err_l, ref_l, alpha, gamma2)).mean()


def bradley_terry_loss(err_w, ref_w, err_l, ref_l, beta):
    """The Bradley-Terry loss that the two hinges approximate (Diffusion-DPO, arXiv 2311.12908), a scalar.

    −log σ(−s) = softplus(s), s = β [(err_w − ref_w) − (err_l − ref_l)], is one smooth hinge, as max(0, s) <=
    softplus(s) <= max(0, s) + log 2. LiVO splits it in two, to trade image quality (β, γ1) off against value conformity
    (α, γ2). The β of Diffusion-DPO's official code is twice this one.
    """
    return F.softplus(beta * ((err_w - ref_w) - (err_l - ref_l))).mean()
