"""The baselines that train: what they train, and the gradient of one step. All see the same pairs, t and noise.

    network, model, value_encoder = trainable(sd, "keys and values")         # what is trained, and the model with it
    TRAINED[method].add(sd, model, value_encoder, pairs, schedule, s)      # adds to network's .grad

Each `add_…` returns the errors (4, B) of the pairs, or a loss for each, (B,).
"""

import copy
import re
from collections import namedtuple
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import train
from lab import uce
from lab.captions import WORDINGS, with_article
from lab.portraits import HARMS
from livo import ValueEncoder, bradley_terry_loss, encode_prompts, livo_loss, make_context
from train import collate, denoising_error, predict, reference_errors


def trainable(sd, part):
    """-> what is trained, a float32 copy; the model that contains it; the value encoder, if it is that, or None."""
    if part == "value encoder":
        network = ValueEncoder.from_text_encoder(sd.text_encoder)  # trained from the text encoder's weights
        return network, sd, network
    name = "text_encoder" if part == "text encoder" else "unet"
    network = copy.deepcopy(getattr(sd, name)).float()
    model = replace(sd, **{name: network})
    if part == "keys and values":
        network = nn.ModuleList(uce.keys_and_values(network))
    return network.requires_grad_(), model, None


# ── Losses on preference pairs: Bradley-Terry, Diffusion-DPO, the two hinges on the text encoder ─────────────────────

BT_SCALE = 2000.0


def hinge_loss(s, principles, preservation, *errors):
    return livo_loss(*errors, s.alpha, s.beta, *train.margins(principles, preservation, s))


def scaled_bradley_terry(s, principles, preservation, err_w, ref_w, err_l, ref_l):
    """(BT_SCALE / β) · bradley_terry_loss: slope 1000 on err_w and −1000 on err_l at the start, for every β.

    At the start err = ref, so the slope is BT_SCALE σ(0). It never exceeds BT_SCALE. LiVO's are β and −α where a hinge
    is active: 1000 and −500. Because of the scale, gradients are clipped at MAX_NORM as the hinges' are. Unscaled, the
    principle with the largest gradients would dominate. A preservation pair has no violating image, as in LiVO.
    """
    err_l, ref_l = (error.masked_fill(preservation, 0) for error in (err_l, ref_l))
    return BT_SCALE / s.beta * bradley_terry_loss(err_w, ref_w, err_l, ref_l, s.beta)


def add_livo(sd, model, value_encoder, pairs, schedule, s):
    return train.add_gradient(sd, value_encoder, pairs, schedule, s)


def add_preference(sd, model, value_encoder, pairs, schedule, s, loss):
    """train.add_gradient for any network and loss: -> errors (4, B).

    The reference is the base model with the plain prompt. Both images go through the UNet in one pass, because the
    Bradley-Terry loss does not split into a term for each.
    """
    prompt_embeds, z_w, z_l, eps, preservation, t = collate(pairs, sd.unet.conv_in.weight.device)
    principles, weight = [pair.principle for pair in pairs], schedule.min_snr_weight(t, s.snr_gamma).to(z_w.device)
    refs, targets = reference_errors(sd.unet, schedule, eps, t, z_w, z_l, prompt_embeds, preservation)
    context = make_context(model, [pair.prompt for pair in pairs], [principles] if value_encoder else [], value_encoder,
                           prompt_embeds if model.text_encoder is sd.text_encoder else None)  # (B, 77 or 78, C)
    output, _ = predict(model.unet, schedule, eps, t, torch.cat([z_w, z_l]), torch.cat([context, context]))
    err_w, err_l = denoising_error(output, torch.cat(targets)).chunk(2)  # (B,) each
    errors = [weight * error for error in (err_w, refs[0], err_l, refs[1])]
    (loss(s, principles, preservation, *errors) * len(pairs) / s.batch).backward()
    return torch.stack(errors).detach()


# ── Concept Ablation ─────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = sorted((words.strip(", ") for harm in HARMS for adjective, phrases in [WORDINGS[harm]]
                for words in (adjective, *phrases)), key=len, reverse=True)  # fmt: skip


def without_harms(prompt):
    """The prompt without words for a toxicity category: "a bloody artist at home" -> "an artist at home"."""
    shorter = prompt
    for words in WORDS:
        shorter = re.sub(rf" *\b{words}\b", "", shorter)
    if shorter == prompt:  # with its articles, which are wrong before some words of no language
        return prompt
    return re.sub(r"\ban? (\w+)", lambda match: with_article(match[1]), shorter).strip()


def add_ablation(sd, model, value_encoder, pairs, schedule, s):
    """Concept Ablation, arXiv 2303.13516, the model-based loss (eq. 5): -> the loss of each pair (B,).

        w_t ‖ sg[ε(x_t, c, t)] − ε(x_t, c*, t) ‖²

    c* is a prompt that asks for a toxicity, c the anchor, the same prompt without these words, and x the aligned image,
    which shows the anchor. sg: no gradient. w_t: min-SNR, as for all. Pairs whose prompt asks for nothing have no loss.
    """
    losses = torch.zeros(len(pairs), device=sd.unet.conv_in.weight.device)
    rows = [row for row, pair in enumerate(pairs) if without_harms(pair.prompt) != pair.prompt]
    if not rows:
        return losses
    concept, z, _, eps, _, t = collate([pairs[row] for row in rows], losses.device)
    with torch.no_grad():
        anchor = encode_prompts(sd, [without_harms(pairs[row].prompt) for row in rows])  # (b, 77, C)
        target, _ = predict(model.unet, schedule, eps, t, z, anchor)
    output, _ = predict(model.unet, schedule, eps, t, z, concept)
    loss = schedule.min_snr_weight(t, s.snr_gamma).to(losses.device) * denoising_error(output, target)  # (b,)
    loss.mean().backward()
    losses[rows] = loss.detach()
    return losses


# ── SafeText ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def safetext_losses(embeds, before, harmful):
    """Prompt embeddings and the base model's, (B, 77, C) each, harmful (B,) -> L_u and L_e of SafeText, scalars.

    L_u is the mean Euclidean distance of harmless prompts' embeddings, L_e the mean −|cosine| of harmful ones'.
    """
    embeds, before = embeds.flatten(1), before.flatten(1)  # (B, 77 C)
    distance = torch.linalg.vector_norm(embeds - before, dim=1)
    cosine = torch.cosine_similarity(embeds, before, dim=1).abs()
    n = harmful.sum()
    return (distance * ~harmful).sum() / (~harmful).sum().clamp(min=1), -(cosine * harmful).sum() / n.clamp(min=1)


def add_safetext(sd, model, value_encoder, pairs, schedule, s):
    """SafeText, arXiv 2502.20623: min L_u − λ L_e over the text encoder -> the loss, (B,).

    The pairs' prompts that ask for a toxicity are harmful, the others harmless. No image is seen.
    """
    prompts = [pair.prompt for pair in pairs]
    harmful = torch.tensor([without_harms(prompt) != prompt for prompt in prompts])
    before = torch.stack([pair.prompt_embeds for pair in pairs])
    embeds = encode_prompts(model, prompts)
    L_u, L_e = safetext_losses(embeds, before.to(embeds.device), harmful.to(embeds.device))
    loss = L_u - s.lam * L_e
    loss.backward()
    return loss.detach().expand(len(pairs))


# Diffusion-DPO is arXiv 2311.12908. In its official code the sigmoid has −0.5 β, so its β is twice this one.
Training = namedtuple("Training", "part add")
TRAINED = {
    "LiVO": Training("value encoder", add_livo),
    "BT on the value encoder": Training("value encoder", partial(add_preference, loss=scaled_bradley_terry)),
    "Diffusion-DPO": Training("unet", partial(add_preference, loss=scaled_bradley_terry)),
    "text encoder": Training("text encoder", partial(add_preference, loss=hinge_loss)),
    "Concept Ablation": Training("keys and values", add_ablation),
    "Concept Ablation, full UNet": Training("unet", add_ablation),
    "SafeText": Training("text encoder", add_safetext)}
