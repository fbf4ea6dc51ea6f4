"""LiVO, Lightweight Value Optimization (arXiv 2410.12700): a frozen text-to-image model learns a value.

    x  prompt            v  principle ("gender equality")
    y_w aligned image    y_l violating image
    θ  the value encoder's weights, the only ones trained
    ℓ(y) = ‖ε − ε_unet(z_t(y), t, context)‖², the mean over (C, H, W), in code err and ref:

                                   y_w      y_l
    ℓ_θ, context [value; prompt]   err_w    err_l     four numbers a pair, of one noise ε and one time t
    ℓ_ref, context [prompt]        ref_w    ref_l     the frozen model's, without gradient

The value encoder reads "v, x" and gives one token. It stands in front of the prompt's tokens where the UNet
attends to the text, so nothing in the UNet changes, and without it the model is the old one to the bit.
"""

import torch
import torch.nn.functional as F

from clip_text import CLIPTextModel

# The published settings: alphas β (aligned) and α (violating), margins γ1 and γ2.
ALPHA, BETA, GAMMA1, GAMMA2 = 500.0, 1000.0, 1.0, 0.5


class ValueEncoder(CLIPTextModel):
    """The CLIP text tower again, trained. ids of "v, x" (B, N) -> the value token (B, 1, C): the pooled output."""

    def forward(self, ids):
        _, pooled = super().forward(ids)
        return pooled[:, None]

    @classmethod
    def from_text_encoder(cls, text_encoder):
        """A float32 copy to train: it starts as the frozen text encoder."""
        self = cls(text_encoder.config).to(next(text_encoder.parameters()).device)
        self.load_state_dict(text_encoder.state_dict())
        return self


def encode_prompts(sd, prompts):
    """B prompts -> what the UNet was trained to attend to, (B, 77, C)."""
    ids = sd.tokenizer(prompts).to(next(sd.text_encoder.parameters()).device)  # (B, 77)
    return sd.text_encoder(ids)[0]


def make_context(sd, prompts, principles=(), value_encoder=None, prompt_embeds=None, unpadded=False):
    """What the UNet attends to: [value tokens; prompt tokens], (B, P + 77, C). Section 3.2 of the paper.

    principles: a text, or a list of P, each a text for all prompts or a list of B texts; none gives the plain prompt.
    prompt_embeds: `encode_prompts` of the prompts, where they are at hand.
    unpadded: the form of the authors' inference code, for prompts of one length n: neither the prompt (cut to
    76) nor the value text is padded, (B, P + n, C). Their training code, and ours, pads.
    """
    device = next(sd.unet.parameters()).device
    principles = [principles] if isinstance(principles, str) else principles
    if prompt_embeds is None:
        if unpadded:
            ids = cut(sd.tokenizer(prompts, pad=False), sd.tokenizer.max_length - len(principles), sd.tokenizer)
            prompt_embeds = sd.text_encoder(ids.to(device))[0]
        else:
            prompt_embeds = encode_prompts(sd, prompts)
    tokens = []
    for principle in principles:
        values = [principle] * len(prompts) if isinstance(principle, str) else principle
        ids = sd.tokenizer([f"{v}, {x}" for v, x in zip(values, prompts)], pad=not unpadded)
        tokens.append(value_encoder(ids.to(device)).to(prompt_embeds.dtype))  # (B, 1, C)
    return torch.cat([*tokens, prompt_embeds], dim=1)


def make_uncond(sd, length, negative="", unpadded=False):
    """The unconditional branch of guidance, as long as the conditional one: (1, length, C).

    Beyond the text tower's 77 tokens, its last (padding) row is repeated.
    """
    if unpadded:
        ids = cut(sd.tokenizer([negative]), length, sd.tokenizer)
        return sd.text_encoder(ids.to(next(sd.text_encoder.parameters()).device))[0]
    prompt_embeds = encode_prompts(sd, [negative])  # (1, 77, C)
    return torch.cat([prompt_embeds, prompt_embeds[:, -1:].expand(-1, length - prompt_embeds.shape[1], -1)], dim=1)


def cut(ids, length, tokenizer):
    """The first `length` of ids (B, N), still with an end of text."""
    if ids.shape[1] > length:
        lost_end = ~(ids[:, :length] == tokenizer.eos_token_id).any(dim=1)
        ids = ids[:, :length].clone()
        ids[lost_end, -1] = tokenizer.eos_token_id
    return ids


# Errors are (B,) float32.


def aligned_hinge(err_w, ref_w, beta=BETA, gamma1=GAMMA1):
    """max(0, γ1 + β (ℓ_θ(y_w) − ℓ_ref(y_w))), (B,): stay close to the frozen model on what is aligned, or get better.

    Silent, gradient and all, once the error is γ1/β below the frozen model's.
    """
    return F.relu(gamma1 + beta * (err_w - ref_w))


def violating_hinge(err_l, ref_l, alpha=ALPHA, gamma2=GAMMA2):
    """max(0, γ2 + α (ℓ_ref(y_l) − ℓ_θ(y_l))), (B,): get worse than the frozen model on what violates.

    Silent once the error is γ2/α above the frozen model's.
    """
    return F.relu(gamma2 + alpha * (ref_l - err_l))


def livo_loss(err_w, ref_w, err_l, ref_l, alpha=ALPHA, beta=BETA, gamma1=GAMMA1, gamma2=GAMMA2):
    """The preference loss, a number: γ1 + γ2 where the value token has no effect. Section 3.3 of the paper."""
    return (aligned_hinge(err_w, ref_w, beta, gamma1) + violating_hinge(err_l, ref_l, alpha, gamma2)).mean()


def bradley_terry_loss(err_w, ref_w, err_l, ref_l, beta):
    """What the two hinges approximate (Diffusion-DPO, arXiv 2311.12908), a number: log 2 without effect.

    −log σ(−s) = softplus(s) with s = β [(ℓ_θ(y_w) − ℓ_ref(y_w)) − (ℓ_θ(y_l) − ℓ_ref(y_l))], which lies between
    max(0, s) and max(0, s) + log 2. LiVO splits that one hinge in two, each with its own slope and margin, so
    that image quality (β, γ1) and value conformity (α, γ2) are traded separately.
    """
    return F.softplus(beta * ((err_w - ref_w) - (err_l - ref_l))).mean()
