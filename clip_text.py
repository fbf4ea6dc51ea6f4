"""CLIP's text side: a tokenizer that turns prompts into ids, a tower that turns ids into features.

    tokenizer = CLIPTokenizer("stable-diffusion-v1-5/tokenizer")
    ids = tokenizer(["a photo of a cat"])              # (1, 77)
    features, pooled = CLIPTextModel(config)(ids)      # (1, 77, 768), (1, 768)

One tower serves SD 1.x (CLIP ViT-L/14) and SD 2.x (OpenCLIP ViT-H/14 without its last layer, as published):
they differ in the numbers of text_encoder/config.json alone. Paper: Radford et al. 2021, arXiv 2103.00020.
"""

import json
import tempfile
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn

from attention import attend, project
from common import UserError, atomic

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass
class CLIPTextConfig:
    """The tower's numbers under config.json's names; the defaults are those of SD 1.x.

    SD 2.x: hidden_size 1024, intermediate_size 4096, 23 layers, 16 heads, hidden_act "gelu".
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    @classmethod
    def from_dict(cls, config):
        """Make it from the dictionary in config.json; keys that it has no field for are ignored.

        Raises UserError where a number is missing, or where the file describes another model than this one.
        """
        if config.get("model_type", "clip_text_model") != "clip_text_model":
            raise UserError(f"text encoder: expected model_type clip_text_model, got {config['model_type']}")
        if missing := [field.name for field in fields(cls) if field.name not in config]:
            raise UserError(f"text encoder: expected {', '.join(missing)} in its config, got none")
        self = cls(**{field.name: config[field.name] for field in fields(cls)})
        if self.hidden_act not in ACTIVATIONS:
            expected = " or ".join(ACTIVATIONS)
            raise UserError(f"text encoder: expected hidden_act {expected}, got {self.hidden_act}")
        if self.eos_token_id == 2:
            # The files of SD 1.x and 2.x say 2, which is "#". The end of text is CLIP's 49407,
            # or the last id of a smaller vocabulary.
            self.eos_token_id = min(49407, self.vocab_size - 1)
        return self


class CLIPEncoderLayer(nn.Module):
    """One layer of either tower, (B, N, C) -> (B, N, C). causal: a token sees only those up to itself (text)."""

    def __init__(self, config, causal=True):
        super().__init__()
        self.causal = causal
        width, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.activation = ACTIVATIONS[config.hidden_act]
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in projections})
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        attention, mlp = self.self_attn, self.mlp
        q, k, v = project(self.layer_norm1(x), attention.q_proj, attention.k_proj, attention.v_proj)
        x = x + attention.out_proj(attend(q, k, v, self.heads, self.causal))
        hidden = self.activation(mlp.fc1(self.layer_norm2(x)))  # (B, N, 4C)
        return x + mlp.fc2(hidden)  # (B, N, C)


class CLIPTextModel(nn.Module):
    """The tower. Its keys are those of the published text_encoder files; it holds parameters, no buffers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(config.vocab_size, width),
                "position_embedding": nn.Embedding(config.max_position_embeddings, width),
            }),
            "encoder": nn.ModuleDict({
                "layers": nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)),
            }),
            "final_layer_norm": nn.LayerNorm(width, eps=config.layer_norm_eps),
        })

    def forward(self, ids):
        """ids (B, N ≤ 77) -> features (B, N, C), and of these the row at the end of text, (B, C).

        Without a padding mask: Stable Diffusion was trained on features that had seen the pads.
        """
        # Pads may repeat the end-of-text id, so the first one counts. In a row that has none,
        # argmax alone would point at the start of text and nobody would notice.
        is_end = (ids == self.config.eos_token_id).int()
        assert is_end.any(dim=1).all(), f"every row needs the end-of-text id {self.config.eos_token_id}"

        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(ids) + embeddings.position_embedding.weight[:ids.shape[1]]  # (B, N, C)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        x = self.text_model.final_layer_norm(x)
        return x, x[torch.arange(len(x), device=x.device), is_end.argmax(dim=1)]  # (B, N, C), (B, C)


END_OF_WORD = "</w>"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# CLIP's words: a special token, an English ending, a run of letters, one digit, a run of anything but spaces.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_backend(bpe):
    """The pipeline in front of the byte pairs: NFC, white space to one space, lower case, words, bytes."""
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def read_json(path):
    """The dictionary in an optional JSON file: {} if there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


class CLIPTokenizer:
    """Prompts to ids, the same ones as transformers 5's CLIPTokenizer (version 4's CLIPTokenizerFast).

    OpenAI's own tokenizer also repairs mojibake (ftfy) and decodes HTML entities; here "&amp;" stays.
    An SD 2.x folder pads with "!", id 0, and reads every "!" of a prompt as that too.

    folder: holds tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json and
    special_tokens_map.json may name the special tokens. Raises UserError if there is no usable vocabulary.
    """

    max_length = 77

    def __init__(self, folder):
        folder = Path(folder)
        try:
            config, whole = read_json(folder / "tokenizer_config.json"), read_json(folder / "tokenizer.json")
            if "added_tokens_decoder" not in config:  # in older folders another file has the last word
                config |= read_json(folder / "special_tokens_map.json")
            if whole:
                vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
                merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
            else:
                vocab, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            self.backend = clip_backend(BPE(vocab, merges, unk_token=EOS, end_of_word_suffix=END_OF_WORD))

            # Tokens found whole, before any splitting: those listed with an id, then the named ones not among
            # them. `normalized` says whether the match ignores case; it differs between published folders.
            added = config.get("added_tokens_decoder") or {t["id"]: t for t in whole.get("added_tokens", [])}
            added = [added[key] for key in sorted(added, key=int)]
            known = {token["content"] for token in added}
            named = [config.get(name) or default for name, default in SPECIAL_TOKENS.items()]
            named = [{"content": token} if isinstance(token, str) else token for token in named]
            added += [{**token, "special": True} for token in named if token["content"] not in known]
            added = [{flag: token[flag] for flag in TOKEN_FLAGS if flag in token} for token in added]
            self.backend.add_tokens([AddedToken(**token) for token in added])
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise UserError(f"{folder}: expected CLIP's vocab.json and merges.txt, or its tokenizer.json, "
                            f"got {error!r}") from error

        self.special_tokens = {name: token["content"] for name, token in zip(SPECIAL_TOKENS, named)}
        if missing := set(self.special_tokens.values()) - set(vocab):
            raise UserError(f"{folder}: expected {', '.join(sorted(missing))} in the vocabulary, got none")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise UserError(f"{folder}: expected the ids 0 to {len(vocab) - 1} once each, got others")
        self.bos_token_id = vocab[self.special_tokens["bos_token"]]
        self.eos_token_id = vocab[self.special_tokens["eos_token"]]
        self.pad_token_id = vocab[self.special_tokens["pad_token"]]

    def __call__(self, texts, pad=True):
        """Texts -> their ids (B, 77), int64: start, words, end, pads. A text is cut to fit, with a warning.

        pad=False: (B, N) without pads, for texts of one length N ≤ 77. Raises UserError for broken Unicode.
        """
        assert not isinstance(texts, str), "the tokenizer takes a list of texts"
        rows, room = [], self.max_length - 2
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"prompt {text!a}: expected Unicode text, got {error.reason}") from error
            # One by one: encode_batch starts threads, which do not survive a DataLoader's fork.
            encoding = self.backend.encode(text)
            if len(encoding) > room:
                lost = text[encoding.offsets[room][0]:]
                warnings.warn(f"prompt cut to {self.max_length} tokens, lost: {lost}", stacklevel=2)
            rows.append([self.bos_token_id, *encoding.ids[:room], self.eos_token_id])
        if pad:
            rows = [row + [self.pad_token_id] * (self.max_length - len(row)) for row in rows]
        return torch.tensor(rows)  # (B, 77)

    def save(self, folder):
        """Write vocab.json, merges.txt and the names of the special tokens, as transformers reads them."""
        model = json.loads(self.backend.to_str())["model"]
        added = {key: {flag: getattr(token, flag) for flag in TOKEN_FLAGS}
                 for key, token in sorted(self.backend.get_added_tokens_decoder().items())}
        config = {**self.special_tokens, "added_tokens_decoder": added, "model_max_length": self.max_length,
                  "tokenizer_class": "CLIPTokenizer"}
        for name, content in {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"]),
            "tokenizer_config.json": json.dumps(config, indent=2),
            "special_tokens_map.json": json.dumps(self.special_tokens, indent=2),
        }.items():
            with atomic(Path(folder) / name) as path:
                path.write_text(content, encoding="utf-8")


def train_tokenizer(texts, vocab_size):
    """Learn byte pairs from `texts` -> a CLIPTokenizer of `vocab_size` ids in CLIP's order.

    The order: 256 bytes, the same 256 at a word's end, merges, start of text, end of text.
    Raises UserError if the texts hold too few pairs to fill it.
    """
    # As reserved tokens all 512 symbols come first, in CLIP's order, even those that the texts do not use:
    # any later prompt can be spelt, and equal texts give equal ids.
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
        return CLIPTokenizer(folder)
