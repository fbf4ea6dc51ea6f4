"""CLIP's tokenizer and text encoder.

    tokenizer = CLIPTokenizer("stable-diffusion-v1-5/tokenizer")
    ids = tokenizer(["a photo of a cat"])              # (1, 77)
    hidden, pooled = CLIPTextModel(config)(ids)        # (1, 77, 768), (1, 768)

SD 1.x uses CLIP ViT-L/14, SD 2.x OpenCLIP ViT-H/14 without its last layer. They are two configurations of one class.
Shapes: B texts, N tokens each (77 in SD), C channels. Paper: Radford et al. 2021, arXiv 2103.00020.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from torch import nn

from attention import attend, project
from common import UserError

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass
class CLIPTextConfig:
    """Field names are those of `text_encoder/config.json`; the defaults are SD 1.x.

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


class CLIPEncoderLayer(nn.Module):
    """One layer of the text (causal) or the image encoder, (B, N, C) -> (B, N, C)."""

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
        q, k, v = project(self.layer_norm1(x), attention.q_proj, attention.k_proj, attention.v_proj)  # (B, N, C) each
        x = x + attention.out_proj(attend(q, k, v, self.heads, self.causal))
        hidden = self.activation(mlp.fc1(self.layer_norm2(x)))  # (B, N, 4C)
        return x + mlp.fc2(hidden)  # (B, N, C)


class CLIPTextModel(nn.Module):
    """The text encoder. Parameter names are those of the published text_encoder files."""

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
        """ids (B, N) -> the last hidden state (B, N, C), and its row at each text's first end-of-text id, (B, C).

        There is no padding mask: Stable Diffusion was trained without one.
        """
        # Padding may repeat the end-of-text id, so the first one counts. argmax alone would return the start of text
        # for a row without any, unnoticed.
        is_end = (ids == self.config.eos_token_id).int()
        assert is_end.any(dim=1).all(), f"every row needs the end-of-text id {self.config.eos_token_id}"

        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(ids) + embeddings.position_embedding.weight[:ids.shape[1]]  # (B, N, C)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        x = self.text_model.final_layer_norm(x)
        return x, x[torch.arange(len(x), device=x.device), is_end.argmax(dim=1)]  # (B, N, C), (B, C)


BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
# CLIP's words: a special token, an English ending, a run of letters, one digit, a run of anything else but spaces.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_backend(bpe):
    """Byte pairs behind NFC, white space to one space, lower case, words, bytes."""
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


class CLIPTokenizer:
    """Texts to ids, equal to those of transformers 5's CLIPTokenizer (version 4's CLIPTokenizerFast).

    OpenAI's own tokenizer also repairs mojibake (ftfy) and decodes HTML entities. Here "&amp;" stays.
    An SD 2.x folder pads with "!", id 0, which is also the id of every "!" in a prompt.

    folder: holds tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json and special_tokens_map.json may
        name the special tokens and the length. Raises UserError without a usable vocabulary.
    """

    max_length = 77  # N, where tokenizer_config.json has no other

    def __init__(self, folder):
        from formats.vocabulary import read_vocabulary  # imported late, as the method does not need it
        bpe, added, self.special_tokens, length = read_vocabulary(Path(folder))
        self.backend = clip_backend(bpe)
        self.backend.add_tokens(added)
        ids = {name: self.backend.token_to_id(token) for name, token in self.special_tokens.items()}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids["bos_token"], ids["eos_token"], ids["pad_token"]
        self.max_length = length or self.max_length

    def __call__(self, texts, pad=True):
        """Texts -> their ids (B, N), int64: start, words, end, padding. A longer text is cut, with a warning.

        pad=False: no padding, for texts of one length. Raises UserError for broken Unicode.
        """
        assert not isinstance(texts, str), "the tokenizer takes a list of texts"
        rows, room = [], self.max_length - 2
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"prompt {text!a}: expected Unicode text, got {error.reason}") from error
            encoding = self.backend.encode(text)
            if len(encoding) > room:
                lost = text[encoding.offsets[room][0]:]
                warnings.warn(f"prompt cut to {self.max_length} tokens, lost: {lost}", stacklevel=2)
            rows.append([self.bos_token_id, *encoding.ids[:room], self.eos_token_id])
        if pad:
            rows = [row + [self.pad_token_id] * (self.max_length - len(row)) for row in rows]
        return torch.tensor(rows)  # (B, N)
