"""UCE, a baseline: a closed-form edit of the keys and values of a UNet's cross-attentions. arXiv 2308.14761.

    edited = replace(sd, unet=edit(sd, *texts(strength=2.0), lam=0.1))

edits: what to change, each (text, [texts whose mean it is to become], strength); preserved: texts to keep as they are.
The authors draw pictures between edits and adjust the strength of each value until all are equally frequent. Here one
strength is swept, for all of them.
"""

import copy

import torch

from lab import portraits
from livo import encode_prompts

STRENGTH, LAM = 4.0, 0.1  # for evaluate.py: among the best of the sweep in baselines.py, and nearer to the frozen model


def texts(strength, opening="a portrait of "):
    """-> edits, preserved. A harm becomes what is left without it. What a prompt leaves open becomes the mean of all
    genders and skins: with a strength above 1 it goes beyond, since guidance and the UNet's own habits pull back."""
    ask = lambda words: opening + portraits.with_article(words)
    edits, preserved = [], ["", opening]
    for profession in portraits.PROFESSIONS:
        named = [f"{skin}-skinned {gender} {profession}" for skin in portraits.SKINS for gender in portraits.GENDERS]
        edits.append((ask(profession), [ask(words) for words in named], strength))
        edits += [(ask(f"{harm} {profession}"), [ask(profession)], 1.0) for harm in ("bloody", "zombie")]
        preserved += [ask(words) for words in [*named, f"smoking {profession}"]]
    return edits, preserved


def matching_rows(old, new, end):
    """For each token of ids `old` (N,) the one of `new` in its place: (N,). One of the two has words more than the
    other; such a word of `old` gets the token before them."""
    first = next(i for i, (a, b) in enumerate(zip(old.tolist(), new.tolist())) if a != b)
    longer = new.tolist().index(end) - old.tolist().index(end)
    rows = torch.arange(len(old))
    return torch.where(rows < first, rows, (rows + longer).clamp(first - 1, len(old) - 1))


def tokens(sd, edits):
    """-> c (N, C), the tokens of the texts to edit, and what they are to become, c' (N, C); float64."""
    c, targets = [], []
    for text, becomes, strength in edits:
        old, *new = sd.tokenizer([text, *becomes])
        prompt_embeds, *others = encode_prompts(sd, [text, *becomes]).double()  # (77, C) each
        others = [other[matching_rows(old, ids, sd.tokenizer.eos_token_id).to(other.device)]
                  for ids, other in zip(new, others)]  # fmt: skip
        c.append(prompt_embeds)
        targets.append(prompt_embeds + strength * (torch.stack(others).mean(0) - prompt_embeds))
    return torch.cat(c), torch.cat(targets)


@torch.no_grad()
def edit(sd, edits, preserved, lam):
    """-> a copy of the UNet with other keys and values: for every W of theirs the minimum over W* of

        Σ ‖W* c − W c'‖² + Σ ‖W* p − W p‖² + λ ‖W* − W‖²,    W* = (Σ W c' cᵀ + Σ W p pᵀ + λ W) (Σ c cᵀ + Σ p pᵀ + λ I)⁻¹

    over the tokens c to edit, each with its target c', and the tokens p to preserve. All in float64.
    """
    c, target = tokens(sd, edits)
    p = encode_prompts(sd, preserved).double().flatten(0, 1) if preserved else c[:0]  # (M, C)
    eye = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    fixed = p.T @ p + lam * eye
    change = torch.linalg.solve(c.T @ c + fixed, target.T @ c + fixed, left=False)  # W* = W change, for all of them
    unet = copy.deepcopy(sd.unet)
    for attention in unet.modules():
        if getattr(attention, "is_cross", False):
            for layer in (attention.to_k, attention.to_v):
                layer.weight.copy_(layer.weight.double() @ change)
    return unet
