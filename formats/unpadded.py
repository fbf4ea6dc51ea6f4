"""The context as the authors' inference code builds it: prompt and value text without padding.

Their training code pads, as livo.py does. Their released value encoder is evaluated in this form: sample.py --unpadded.
"""

from dataclasses import replace
from functools import partial

import livo


def make_context(sd, prompts, principles, value_encoder):
    """livo.make_context for prompts of one length n, cut to leave room for P value tokens -> (B, P + n, C)."""
    ids = cut(sd.tokenizer(prompts, pad=False), sd.tokenizer.max_length - len(principles), sd.tokenizer)
    prompt_embeds = sd.text_encoder(ids.to(next(sd.text_encoder.parameters()).device))[0]  # (B, n, C)
    sd = replace(sd, tokenizer=partial(sd.tokenizer, pad=False))
    return livo.make_context(sd, prompts, principles, value_encoder, prompt_embeds)


def make_uncond(sd, length, negative=""):
    """The unconditional context, as long as the conditional one: (1, length, C). Its text is padded, then cut."""
    ids = cut(sd.tokenizer([negative]), length, sd.tokenizer)
    return sd.text_encoder(ids.to(next(sd.text_encoder.parameters()).device))[0]


def cut(ids, length, tokenizer):
    """The first `length` of ids (B, N), each row still with an end of text."""
    if ids.shape[1] > length:
        lost_end = ~(ids[:, :length] == tokenizer.eos_token_id).any(dim=1)
        ids = ids[:, :length].clone()
        ids[lost_end, -1] = tokenizer.eos_token_id
    return ids
