"""Two baselines that change a step of the sampler and train nothing. Both ask the UNet about more prompts.

    safe_latent_diffusion(sd, SAMPLING, prompt, seeds, **SLD["medium"])      # arXiv 2211.05105, against toxicity
    fair_diffusion(sd, SAMPLING, prompt, seeds, scale=5, threshold=0.9)      # arXiv 2302.10893, against bias

Predictions are of the noise, (B, 4, h, w): ε(z) without a prompt, ε(z, p) with it, ε(z, c) for another text c.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lab import toy
from lab.captions import WORDINGS, with_article
from lab.evaluate import by_seed, majority_class
from livo import encode_prompts
from sample import generate

SAFETY_CONCEPT = "a portrait of a bloody zombie"
# The published configurations. Their warm-up is of 50 steps, here in as large a fraction of 12.
SLD = {"weak": {"scale": 200, "threshold": 0.0, "warmup": 4, "momentum_scale": 0.0, "beta": 0.0},
       "medium": {"scale": 1000, "threshold": 0.01, "warmup": 2, "momentum_scale": 0.3, "beta": 0.4},
       "strong": {"scale": 2000, "threshold": 0.025, "warmup": 2, "momentum_scale": 0.5, "beta": 0.7},
       "max": {"scale": 5000, "threshold": 1.0, "warmup": 0, "momentum_scale": 0.5, "beta": 0.7}}  # fmt: skip


class GuidedUNet(nn.Module):
    """Stands in for the UNet of `denoise`, whose own guidance is then off: -> the guided noise of a step.

    contexts: (1 + K, N, C), of the empty prompt and of K other texts.
    guide(uncond, *others, cond, momentum=, step=): -> the noise, and the momentum of the next step.
    """

    def __init__(self, unet, contexts, guide):
        super().__init__()
        self.unet, self.config, self.conv_in = unet, unet.config, unet.conv_in
        self.contexts, self.guide = contexts, guide

    def embed(self, t):
        self.step, self.momentum = 0, 0.0  # `denoise` embeds all timesteps at once, where a trajectory begins
        return self.unet.embed(t)

    def forward(self, x, time_emb, context):
        n = 1 + len(self.contexts)
        contexts = torch.cat([self.contexts.repeat_interleave(len(x), 0), context])  # (n B, N, C)
        predictions = self.unet(x.repeat(n, 1, 1, 1), time_emb, contexts).float().chunk(n)
        noise, self.momentum = self.guide(*predictions, momentum=self.momentum, step=self.step)
        self.step += 1
        return noise


def generate_guided(sd, settings, prompt, seeds, texts, guide):
    """-> one PIL image per seed, each step of which `guide` combines from the prompt's and the texts' predictions."""
    with torch.no_grad():
        unet = GuidedUNet(sd.unet, encode_prompts(sd, ["", *texts]), guide)
    return by_seed(generate(replace(sd, unet=unet), prompt, "", [], None, seeds, **settings | {"guidance": 1}))


# ── Safe Latent Diffusion ────────────────────────────────────────────────────────────────────────────────────────────

def safety_guidance(uncond, concept, cond, *, momentum, step, guidance, scale, threshold, warmup, momentum_scale, beta):
    """A step of arXiv 2211.05105, eqs. 3 to 8: away from the concept S where the prompt's noise is close to S's.

        ε̄ = ε(z) + s_g (ε(z, p) − ε(z) − γ),     γ = μ (ε(z, S) − ε(z)) + s_m ν
        μ = min(1, s_S |ε(z, p) − ε(z, S)|) where ε(z, p) − ε(z, S) < λ, else 0
        ν ← β ν + (1 − β) γ, from the first step on; but γ counts only after the warm-up

    As in the authors' code; their eq. 5 says max(1, …). scale, threshold: s_S, λ.
    """
    difference = cond - concept
    weight = torch.where(difference < threshold, (scale * difference.abs()).clamp(max=1), 0)
    safety = weight * (concept - uncond) + momentum_scale * momentum
    direction = cond - uncond - (safety if step >= warmup else 0)
    return uncond + guidance * direction, beta * momentum + (1 - beta) * safety


def safe_latent_diffusion(sd, settings, prompt, seeds, **options):
    """-> one PIL image per seed. It reads no principle: the concept names both toxicity categories."""
    guide = partial(safety_guidance, guidance=settings["guidance"], **options)
    return generate_guided(sd, settings, prompt.text, seeds, [SAFETY_CONCEPT], guide)


# ── Fair Diffusion ───────────────────────────────────────────────────────────────────────────────────────────────────

def largest(x, threshold):
    """x (B, C, h, w), 0 where |x| is below the channel's quantile `threshold`."""
    quantile = x.abs().flatten(2).quantile(threshold, dim=2)[..., None, None]  # (B, C, 1, 1)
    return torch.where(x.abs() >= quantile, x, 0)


def fair_guidance(uncond, wanted, unwanted, cond, *, momentum, step, guidance, scale, threshold, warmup=2,
                  momentum_scale=0.1, beta=0.4):
    """A step of arXiv 2302.10893: the semantic guidance of SEGA, arXiv 2301.12247, eqs. 3 to 8, towards one class.

        ε̄ = ε(z) + s_g (ε(z, p) − ε(z)) + γ,     γ = Σ_c μ ψ_c + s_m ν
        ψ = ε(z, wanted) − ε(z) and ε(z) − ε(z, unwanted);   μ = s_e where |ψ| is above its quantile λ, else 0
        ν ← β ν + (1 − β) γ, from the first step on; but γ counts only after the warm-up

    scale, threshold: s_e, λ. Warm-up and momentum are the defaults of SEGA in diffusers, where 10 of 50 steps warm up.
    """
    edit = sum(largest(scale * direction, threshold) for direction in (wanted - uncond, uncond - unwanted))
    edit = edit + momentum_scale * momentum
    noise = uncond + guidance * (cond - uncond) + (edit if step >= warmup else 0)
    return noise, beta * momentum + (1 - beta) * edit


def fair_diffusion(sd, settings, prompt, seeds, **options):
    """-> one PIL image per seed, from the profession's majority class towards each other class in turn.

    prompt.principles: one bias principle. The caller chooses the seeds, `livo.spread` of all.
    """
    attribute = toy.PRINCIPLES[prompt.principles[0]]
    majority = majority_class(attribute, prompt.profession)
    others = [value for value in toy.probabilities(attribute, prompt.profession) if value != majority]
    guide, images = partial(fair_guidance, guidance=settings["guidance"], **options), [None] * len(seeds)
    for i, value in enumerate(others[:len(seeds)]):
        texts = ["a portrait of " + with_article(f"{WORDINGS[word][0]} person") for word in (value, majority)]
        images[i::len(others)] = generate_guided(sd, settings, prompt.text, seeds[i::len(others)], texts, guide)
    return images
