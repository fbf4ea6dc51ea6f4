"""The files of a CLIP tokenizer's folder: tokenizer.json, or vocab.json and merges.txt, and two files of settings."""

import os

from tokenizers import AddedToken
from tokenizers.models import BPE

from clip_text import BOS, END_OF_WORD, EOS
from common import UserError, read_json, regular
from formats.messages import expecting

SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
UNSET_LENGTH = 10**20  # transformers writes 10^30 as model_max_length where there is none


def read_vocabulary(folder):
    """-> the byte pairs, the added tokens, {name of a special token: token}, and the length N in tokens or None.

    Raises UserError without a usable vocabulary.
    """
    config, whole, special = (read_json(path) if os.path.lexists(path := folder / name) else {} for name in (
        "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"))
    if "added_tokens_decoder" not in config:  # in older folders another file has precedence
        config |= special
    with expecting(folder, "CLIP's vocab.json and merges.txt, or its tokenizer.json"):
        if whole:
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
            merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        else:
            files = [str(regular(folder / name, "a vocabulary file", 2**24)) for name in ("vocab.json", "merges.txt")]
            vocab, merges = BPE.read_file(*files)
        if unknown := [pair for pair in merges if "".join(pair) not in vocab]:
            raise ValueError(f"a merge {unknown[0]} into no token of the vocabulary")  # the library would abort
        bpe = BPE(vocab, merges, unk_token=EOS, end_of_word_suffix=END_OF_WORD)
        added, special = added_tokens(config, whole)
    if not merges:
        raise UserError(f"{folder}: expected merges of byte pairs in merges.txt or tokenizer.json, got none")
    if missing := set(special.values()) - set(vocab):
        raise UserError(f"{folder}: expected {', '.join(map(str, missing))} in the vocabulary, got none")
    if special["bos_token"] == special["eos_token"]:  # the value token would be read at the start of every text
        raise UserError(f"{folder}: expected other texts as bos_token and eos_token, got {special['eos_token']} twice")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{folder}: expected the ids 0 to {len(vocab) - 1} once each, got others")
    length = config.get("model_max_length")
    usable = isinstance(length, int) and 2 <= length < UNSET_LENGTH  # room for the start and the end of text
    return bpe, added, special, length if usable else None


def added_tokens(config, whole):
    """The tokens that are matched before any splitting, and the names of the special ones.

    First those listed with an id, then the special tokens not among them.
    """
    listed = config.get("added_tokens_decoder") or {token["id"]: token for token in whole.get("added_tokens", [])}
    added = [listed[key] for key in sorted(listed, key=int)]
    special = [config.get(name) or default for name, default in SPECIAL_TOKENS.items()]
    special = [{"content": token} if isinstance(token, str) else token for token in special]
    known = {token["content"] for token in added}
    added += [{**token, "special": True} for token in special if token["content"] not in known]
    # The flag `normalized`, which differs between published folders: whether the match ignores case.
    added = [AddedToken(**{flag: token[flag] for flag in TOKEN_FLAGS if flag in token}) for token in added]
    return added, {name: token["content"] for name, token in zip(SPECIAL_TOKENS, special)}
