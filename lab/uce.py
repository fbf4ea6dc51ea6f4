"""UCE, a baseline: a closed-form edit of the keys and values of a UNet's cross-attention. arXiv 2308.14761.

    edited = replace(sd, unet=edit(sd, *texts(strength=2.0), lam=0.1))

edits: what to change, each (text, [target texts], strength); preserved: texts to keep as they are. The authors generate
images between edits, and adapt a strength per class until all classes are equally frequent. Here one strength is tuned.
"""

import copy

import torch

from lab import portraits
from lab.captions import with_article
from livo import encode_prompts
from unet import TransformerBlock

STRENGTH, LAM = 2.0, 0.1  # for evaluate.py: the best of the sweep in baselines.py


def texts(strength, opening="a portrait of "):
    """-> edits, preserved: the edits against toxicity and bias of the toy dataset.

    A toxicity category becomes the text without it. An unspecified gender and skin become the mean of all classes. A
    strength above 1 goes beyond it, because guidance and the rest of the UNet pull back to the majority class.
    """
    ask = lambda words: opening + with_article(words)
    edits, preserved = [], ["", opening]
    for profession in portraits.PROFESSIONS:
        specified = [f"{skin}-skinned {gender} {profession}"
                     for skin in portraits.SKINS for gender in portraits.GENDERS]  # fmt: skip
        edits.append((ask(profession), [ask(words) for words in specified], strength))
        edits += [(ask(f"{harm} {profession}"), [ask(profession)], 1.0) for harm in ("bloody", "zombie")]
        preserved += [ask(words) for words in [*specified, f"smoking {profession}"]]
    return edits, preserved


def matching_rows(old, new, end):
    """For each token of the ids `old` (N,) the index of its counterpart in `new` (N,).

    The texts differ in words inserted at one place. An inserted word of `old` gets the token before it.
    """
    first = next(i for i, (a, b) in enumerate(zip(old.tolist(), new.tolist())) if a != b)
    longer = new.tolist().index(end) - old.tolist().index(end)
    rows = torch.arange(len(old))
    return torch.where(rows < first, rows, (rows + longer).clamp(first - 1, len(old) - 1))


def keys_and_values(unet):
    """-> the linear layers of all cross-attentions that read the context."""
    blocks = [block for block in unet.modules() if isinstance(block, TransformerBlock)]
    return [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]


def token_targets(sd, edits):
    """-> the token embeddings c (M, C) of the texts to edit and their targets c' (M, C), float64."""
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
    """-> a copy of the UNet in which each key and value projection W of a cross-attention is the W* that minimizes

        Σ ‖W* c − W c'‖² + Σ ‖W* p − W p‖² + λ ‖W* − W‖²,    W* = (Σ W c' cᵀ + Σ W p pᵀ + λ W) (Σ c cᵀ + Σ p pᵀ + λ I)⁻¹

    over the tokens c to edit, each with its target c', and the tokens p to preserve. Computed in float64.
    """
    c, target = token_targets(sd, edits)
    p = encode_prompts(sd, preserved).double().flatten(0, 1) if preserved else c[:0]  # (M', C)
    eye = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    fixed = p.T @ p + lam * eye
    change = torch.linalg.solve(c.T @ c + fixed, target.T @ c + fixed, left=False)  # (C, C): W* = W change for every W
    unet = copy.deepcopy(sd.unet)
    for layer in keys_and_values(unet):
        layer.weight.copy_(layer.weight.double() @ change)
    return unet
