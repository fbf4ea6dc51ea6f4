"""The whole CLIP: its image encoder, a vision transformer, beside the text encoder of clip_text.py.

    clip = load_clip("openai/clip-vit-large-patch14")                       # a hub name or a folder
    clip.image_features(images) @ clip.text_features(["a cat"]).T           # cosines, (N, 1)
    zero_shot(clip, images, ["a photo of a cat", "a photo of a dog"])       # probabilities, (N, 2)

Training maps an image and its caption to nearby directions of one space. A text can therefore name a class for which
no classifier was trained. Papers: Radford et al. 2021, arXiv 2103.00020 (CLIP); Dosovitskiy et al. 2020, arXiv
2010.11929 (the vision transformer).
"""

import math
from dataclasses import asdict, dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from clip_text import ACTIVATIONS, CLIPEncoderLayer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from common import UserError, atomic_folder, read_json, write_json
from formats.checks import fit_to_tokenizer, listing, text_config
from formats.export import save_tokenizer
from formats.fields import pick_fields
from formats.files import weight_files
from formats.hub import fetch
from lab.portraits import stack
from weights import SubModel, build, local, read_tensors

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
# transformers' defaults, for keys that config.json leaves out: those of ViT-B/32.
TEXT_DEFAULTS = asdict(CLIPTextConfig()) | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8)


@dataclass
class CLIPVisionConfig:
    """The image encoder under config.json's names. ViT-L/14 has hidden_size 1024, intermediate_size 4096, 24 layers,
    16 heads and patch_size 14."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass
class CLIPConfig:
    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int = 512


class CLIPImageEncoder(nn.Module):
    """Images (B, 3, H, H) -> (B, C): the output of the class token."""

    def __init__(self, config):
        super().__init__()
        width, patch, eps = config.hidden_size, config.patch_size, config.layer_norm_eps
        patches = (config.image_size // patch) ** 2
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.embeddings.position_embedding = nn.Embedding(1 + patches, width)
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)  # the published parameter name
        layers = [CLIPEncoderLayer(config, causal=False) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, images):
        embeddings = self.embeddings
        x = embeddings.patch_embedding(images).flatten(2).mT  # (B, patches, C)
        x = torch.cat([embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + patches, C)
        x = self.pre_layrnorm(x + embeddings.position_embedding.weight)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPModel(CLIPTextModel):
    """Both encoders and their projections into one space of D dimensions.

    A subclass of the text encoder, as the published parameter names are `text_model.…` beside `vision_model.…`.
    """

    def __init__(self, config):
        super().__init__(config.text)
        self.whole_config = config
        self.vision_model = CLIPImageEncoder(config.vision)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # its initial value

    def embed_texts(self, ids):
        """ids (B, 77) -> (B, D)."""
        _, pooled = self(ids)
        return self.text_projection(pooled)

    def embed_images(self, images):
        """(B, 3, H, H), normalized -> (B, D)."""
        return self.visual_projection(self.vision_model(images))


@dataclass
class Preprocessor:
    """PIL images -> the input of the image encoder."""

    size: int  # pixels
    mean: list  # of red, green and blue in [0, 1]
    std: list

    def __call__(self, images):
        """N PIL images of any sizes and modes -> (N, 3, size, size) float32."""
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (stack(map(self.crop, images)) / 255 - mean) / std

    def crop(self, image):
        """Resize the shorter side to `size`, then center-crop."""
        image, short = image.convert("RGB"), min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + self.size, top + self.size))


def read_clip_config(path):
    """config.json -> CLIPConfig. Raises UserError for another kind of model."""
    config = read_json(path)
    text, vision = config.get("text_config"), config.get("vision_config")
    if config.get("model_type", "clip") != "clip" or not isinstance(text, dict) or not isinstance(vision, dict):
        raise UserError(f"{path}: expected model_type clip with a text_config and a vision_config, "
                        f"got model_type {config.get('model_type')}")
    vision = pick_fields(CLIPVisionConfig, vision, path)
    if vision.hidden_act not in ACTIVATIONS:
        raise UserError(f"{path}, image encoder: expected hidden_act {' or '.join(ACTIVATIONS)}, "
                        f"got {vision.hidden_act}")
    return pick_fields(CLIPConfig, config | {"text": text_config(TEXT_DEFAULTS | text, path), "vision": vision}, path)


def preprocessing_steps(size):
    """What Preprocessor does, as preprocessor_config.json names it."""
    return {"do_resize": True, "size": {"shortest_edge": size}, "resample": Image.Resampling.BICUBIC,
            "do_center_crop": True, "crop_size": {"height": size, "width": size},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}


def read_preprocessor(path, size):
    """preprocessor_config.json -> Preprocessor. Raises UserError for other steps than its own."""
    config = read_json(path)
    config |= {key: preprocessing_steps(size)[key] for key in ("size", "crop_size") if config.get(key) == size}  # older
    wrong = [f"{key} {value}, got {config[key]}" for key, value in preprocessing_steps(size).items()
             if config.get(key, value) != value]
    for key, low in ("image_mean", 0), ("image_std", 1e-3):
        values = config.get(key)
        if not isinstance(values, list) or len(values) != 3 or not all(
                isinstance(x, float | int) and low <= x <= 10 for x in values):
            wrong.append(f"{key} of three numbers from {low} to 10, got {values}")
    if wrong:
        raise UserError(f"{path}: expected {'; '.join(wrong)}")
    return Preprocessor(size, config["image_mean"], config["image_std"])


@dataclass
class CLIP:
    model: CLIPModel
    tokenizer: CLIPTokenizer
    preprocessor: Preprocessor

    @torch.no_grad()
    def image_features(self, images, batch_size=16):
        """An iterable of N PIL images -> unit vectors (N, D), float32."""
        weight, images, features = self.model.visual_projection.weight, iter(images), []
        while batch := list(islice(images, batch_size)):
            x = self.preprocessor(batch).to(weight.device, weight.dtype)  # (B, 3, size, size)
            features.append(F.normalize(self.model.embed_images(x).float(), dim=1))  # (B, D)
        return torch.cat(features)

    @torch.no_grad()
    def text_features(self, texts, batch_size=4096):
        """N texts -> unit vectors (N, D), float32."""
        ids = self.tokenizer(texts).to(self.model.text_projection.weight.device)  # (N, 77)
        return torch.cat([F.normalize(self.model.embed_texts(some).float(), dim=1) for some in ids.split(batch_size)])


def zero_shot(clip, images, texts):
    """The probability of each text for each image, a softmax over the texts: (N, len(texts)).

    images: N PIL images, or their features (N, D).
    """
    features = images if torch.is_tensor(images) else clip.image_features(images)
    cosines = features @ clip.text_features(texts).T
    return (clip.model.logit_scale.float().exp() * cosines).softmax(1)


def load_clip(source, *, dtype=torch.float32, device="cpu"):
    """Load a frozen CLIP from a hub name or a folder in transformers' CLIPModel layout.

    The folder holds config.json, the weights, the tokenizer's files and preprocessor_config.json. Raises UserError if
    one is missing or does not fit.
    """

    def wanted(names):
        tokenizer = [name for name in TOKENIZER_FILES if name in names]
        return ["config.json", "preprocessor_config.json", *tokenizer, *weight_files(names, dtype, source)]

    folder = local(source) or fetch(str(source), wanted, ["config.json"])
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a CLIP model, got a file")
    config = read_clip_config(folder / "config.json")
    preprocessor = read_preprocessor(folder / "preprocessor_config.json", config.vision.image_size)
    tokenizer = CLIPTokenizer(folder)
    fit_to_tokenizer(config.text, tokenizer, source)
    tensors = {}
    for name in weight_files(listing(folder), dtype, folder):
        tensors |= read_tensors(folder / name)
    return CLIP(build(CLIPModel, SubModel(config, tensors, folder), dtype, device), tokenizer, preprocessor)


def save_clip(model, tokenizer, preprocessor, folder, dtype=torch.float16):
    """Write the CLIPModel layout of transformers, atomically."""
    config = model.whole_config
    parts = {"text_config": asdict(config.text) | {"model_type": "clip_text_model"},
             "vision_config": asdict(config.vision) | {"model_type": "clip_vision_model"}}
    with atomic_folder(folder, "config.json") as root:
        write_json(root / "config.json", {"architectures": ["CLIPModel"], "model_type": "clip",
                                          "projection_dim": config.projection_dim, **parts})
        write_json(root / "preprocessor_config.json", {
            "image_processor_type": "CLIPImageProcessor", **preprocessing_steps(preprocessor.size),
            "image_mean": preprocessor.mean, "image_std": preprocessor.std, "do_convert_rgb": True})
        save_tokenizer(tokenizer, root)
        save_file({name: t.to("cpu", dtype).contiguous() for name, t in model.state_dict().items()},
                  root / "model.safetensors", metadata={"format": "pt"})
