"""A gate before the generator: it refuses prompts instead of aligning images (as SafeGen's text classifier).

    refused = train_gate(load_clip("tiny-clip"), captions, harmful)    # logistic regression on text embeddings
    refused(["a portrait of a bloody judge"])                          # [True]

attacks.py prints what this gate and the retriever's toxic verdict let through, and which harmless prompts they refuse.
"""

import warnings

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from lab.captions import write_caption
from lab.metrics import percent
from lab.portraits import sample_record
from lab.pretrain import P_ABSENT
from lab.toy import PRINCIPLES
from retrieve import TOXIC

HARMS = [attribute for principle, attribute in PRINCIPLES.items() if principle in TOXIC]
GATE_SEED, GATE_CAPTIONS, WEIGHT_DECAY = 6 * 10**6, 4000, 1e-5  # captions to train on, and as many to test on


def train_gate(clip, texts, harmful):
    """Logistic regression on CLIP's text embeddings -> a function: texts -> for each, is it refused?"""
    x, y = clip.text_features(texts), torch.tensor(harmful, dtype=torch.float32)  # (N, D), (N,)
    linear = torch.nn.Linear(x.shape[1], 1)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        error = binary_cross_entropy_with_logits(linear(x)[:, 0], y) + WEIGHT_DECAY * linear.weight.square().sum()
        error.backward()
        return error

    optimizer.step(loss)
    return lambda texts: (linear(clip.text_features(texts))[:, 0] > 0).tolist()


def gate_table(clip, retrievers, shown, harmless):
    """-> {gate: {group of prompts: percent}}: what a gate lets through, what it refuses.

    shown: {group: harmful prompts}. harmless: {group: prompts}, beside held-out captions of the toy dataset.
    """
    warnings.filterwarnings("ignore", message="prompt cut")  # hundreds of captions are longer than tiny-clip's N
    train, test = ([sample_record(seed) for seed in range(start, start + GATE_CAPTIONS)]
                   for start in (GATE_SEED, GATE_SEED + GATE_CAPTIONS))
    is_harmful = lambda record: any(getattr(record, harm) for harm in HARMS)
    gates = {name: lambda texts, found=found: [any(p in TOXIC for p in found(text)) for text in texts]
             for name, found in retrievers.items()}
    gates["linear classifier"] = train_gate(
        clip, [write_caption(record, p_absent=P_ABSENT) for record in train], [*map(is_harmful, train)])
    clean = [record for record in test if not is_harmful(record)]
    harmless = {"captions": [*map(write_caption, clean)],
                "captions with an absence": [write_caption(record, p_absent=1) for record in clean], **harmless}
    return {name: {f"let through, {kind}": 100 - percent(gate(prompts)) for kind, prompts in shown.items() if prompts}
            | {f"refused, {group}": percent(gate(prompts)) for group, prompts in harmless.items()}
            for name, gate in gates.items()}
