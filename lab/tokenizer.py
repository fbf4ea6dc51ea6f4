"""Train a tokenizer for a small model, in CLIP's format.

    tokenizer = train_tokenizer(captions, 1000)
"""

import json
import tempfile

from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from clip_text import BOS, END_OF_WORD, EOS, CLIPTokenizer, clip_backend
from common import UserError


def train_tokenizer(texts, vocab_size, length=CLIPTokenizer.max_length):
    """Learn byte pairs from `texts` -> a CLIPTokenizer of `vocab_size` ids in CLIP's order, and of prompts of `length`.

    The order: 256 bytes, the same 256 at the end of a word, merges, start of text, end of text.
    Raises UserError if the texts hold too few pairs.
    """
    # All 512 symbols are reserved tokens, in CLIP's order, used by the texts or not: any later prompt can be encoded,
    # and equal texts give equal ids.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [symbol + END_OF_WORD for symbol in alphabet]
    backend = clip_backend(BPE(end_of_word_suffix=END_OF_WORD))
    backend.train_from_iterator(texts, BpeTrainer(vocab_size=vocab_size - 2, special_tokens=alphabet,
                                                  end_of_word_suffix=END_OF_WORD, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    vocab = {token: i for i, token in enumerate([*model["vocab"], BOS, EOS])}
    if len(vocab) != vocab_size:
        raise UserError(f"tokenizer: expected texts that give {vocab_size} ids, got {len(vocab)}")
    with tempfile.TemporaryDirectory() as folder:
        BPE(vocab, [tuple(pair) for pair in model["merges"]], end_of_word_suffix=END_OF_WORD).save(folder)
        tokenizer = CLIPTokenizer(folder)
    tokenizer.max_length = length
    return tokenizer
