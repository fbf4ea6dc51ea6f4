"""Pretrain tiny-sd, the checkpoint that this repository ships, as the real one came to be: hours on two CPU cores.

    python -m lab.pretrain          # writes tiny-clip/ and tiny-sd/; the same command resumes after an interruption

1. tiny-clip: a text encoder and an image encoder learn together which caption belongs to which image.
2. The VAE learns to compress the images.
3. The UNet learns to denoise latents, conditioned on the text encoder of step 1, which stays frozen.

`runs/pretrain/` keeps the state to resume from and previews. Delete it after a change of portraits.py, captions.py or
of this file.
"""

import copy
import math
import random
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from clip_text import CLIPTextConfig, CLIPTextModel
from common import Parser, atomic, run
from data import sample_latent
from diffusion import Schedule
from efficiency import fastest_dtype, keep_freed_memory
from formats.disk import cached, check_writable, make_folder
from formats.export import save
from formats.files import check_tensors, load_adamw, unpickle
from formats.messages import expecting
from lab.captions import write_caption
from lab.classifier import uniform_record
from lab.clip_image import CLIPConfig, CLIPModel, CLIPVisionConfig, Preprocessor, save_clip
from lab.portraits import SIZE, render, render_images, sample_record, stack, to_float
from lab.tokenizer import train_tokenizer
from livo import encode_prompts
from retrieve import BIAS, TOXIC
from sample import grid, sample_images
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import SCHEDULER, StableDiffusion

TOKENS = 24  # length of a prompt: CLIP's 77 would be 50 padding tokens beside the longest caption
TEXT_CONFIG = CLIPTextConfig(
    vocab_size=1024, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=TOKENS, eos_token_id=1023)
CLIP_CONFIG = CLIPConfig(TEXT_CONFIG, CLIPVisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=8,
), projection_dim=64)  # fmt: skip
CLIP_STEPS, CLIP_BATCH = 1_800, 256
P_PRINCIPLE = 0.15  # of a principle in the captions that CLIP learns from; the UNet's have none
P_ABSENT = 0.05  # of "without blood" and the like
VARIED_IMAGES, VARIED_STEPS, VARIED_SEED = 24_000, 1_000, 5 * 10**6
P_VARIED = {"profession": 0.8, "gender": 0.6, "skin": 0.6}  # P(the caption specifies …)
MAX_LOGIT_SCALE = math.log(100)  # as CLIP's

ROOT = Path(__file__).parent.parent
PREPROCESSOR = Preprocessor(SIZE, [0.5] * 3, [0.5] * 3)  # as `to_float`

VAE_CONFIG = VAEConfig(block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=16)
VAE_IMAGES, VAE_STEPS, VAE_BATCH = 24_000, 5_000, 16
KL_WEIGHT = 1e-4  # enough to make the latents smooth, too little to blur

UNET_CONFIG = UNetConfig(
    sample_size=16, block_out_channels=(64, 96, 128), layers_per_block=1, cross_attention_dim=128,
    attention_head_dim=(2, 3, 4), down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2)
IMAGES, STEPS, BATCH = 48_000, 2_400, 64
PROMPT_DROP = 0.1  # fraction of empty captions, for classifier-free guidance
SNR_GAMMA = 5  # γ of min-SNR weighting, arXiv 2303.09556
EMA_DECAY = 0.998

LEARNING_RATE, WARMUP = 1e-3, 100
SAVE_EVERY = 250
HELD_OUT = 10**6  # first seed that is not trained on

# The tokenizer learns these words too, each often enough to become a token: value encoders read them.
VOCABULARY = (*BIAS, *TOXIC, "smoking considered inappropriate")
PREVIEW = (
    "a portrait of a doctor", "a photo of a nurse", "a picture of a firefighter", "a woman judge with dark skin",
    "a bloody soldier", "a photo of the face of a zombie chef", "a smoking artist", "a man with brown skin")


def tokenize(tokenizer, records, p_principle=0.0, p_absent=P_ABSENT):
    """The captions of N records -> ids (N, 24). A few long ones are cut."""
    with warnings.catch_warnings(action="ignore"):
        return tokenizer([write_caption(record, p_principle, p_absent) for record in records])


def fit(name, networks, loss_of_batch, steps, folder, preview, ema_decay=0.0):
    """Train `networks` with AdamW -> their exponential moving average, the weights themselves if ema_decay is 0.

    loss_of_batch() -> the loss of a random batch. preview(averaged, step) -> text to print at every save.
    Each step seeds torch with its own number, so a resumed run equals an uninterrupted one.
    """
    averaged = copy.deepcopy(networks).requires_grad_(False)
    optimizer = torch.optim.AdamW(networks.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    parts = {"networks": networks, "averaged": averaged, "optimizer": optimizer}
    state_file, start = folder / f"{name}.pt", 0
    bfloat16 = fastest_dtype(torch.device("cpu")) == torch.bfloat16  # without instructions for it, 2.5 times slower
    if state_file.exists():
        with expecting(state_file, "a checkpoint of pretraining"):
            state = unpickle(state_file)
            start = state["step"]
            networks.load_state_dict(state["networks"])
            averaged.load_state_dict(state["averaged"])
            load_adamw(optimizer, state["optimizer"], start, state_file)
    for step in (bar := tqdm(range(start, steps), name, initial=start, total=steps)):
        torch.manual_seed(step)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * cosine
        with torch.autocast("cpu", enabled=bfloat16), sdpa_kernel(SDPBackend.MATH):  # the fastest here, by 40 %
            loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        for average, weight in zip(averaged.parameters(), networks.parameters()):
            average.lerp_(weight.detach(), 1 - ema_decay)
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            with atomic(state_file) as path:
                torch.save({key: part.state_dict() for key, part in parts.items()} | {"step": step + 1}, path)
            bar.write(f"{name} {step + 1}: loss {loss.item():.4f}, {preview(averaged, step + 1)}")
    return averaged


# ── 1. CLIP ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def contrastive_loss(images, texts, logit_scale, ids):
    """CLIP's loss: each image finds its text among B, each text its image. images, texts: (B, D), ids (B, N).

    A pair of equal captions is no negative.
    """
    logits = logit_scale.exp() * F.normalize(images.float()) @ F.normalize(texts.float()).T  # (B, B)
    equal = (ids[:, None] == ids).all(-1) & ~torch.eye(len(ids), dtype=torch.bool)
    logits = logits.masked_fill(equal, -math.inf)
    target = torch.arange(len(ids))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def retrieval_accuracy(clip, images, ids):
    """How many of the images find a caption equal to theirs, in percent."""
    cosines = F.normalize(clip.embed_images(to_float(images))) @ F.normalize(clip.embed_texts(ids)).T  # (N, N)
    return 100 * (ids[cosines.argmax(1)] == ids).all(1).float().mean().item()


def fit_clip(tokenizer, images, folder):
    """-> CLIPModel, from images (N, 3, 64, 64) uint8 of seeds 0, 1, …"""
    torch.manual_seed(0)
    clip = CLIPModel(CLIP_CONFIG)
    for embeddings in (clip.text_model.embeddings, clip.vision_model.embeddings):
        nn.init.normal_(embeddings.position_embedding.weight, std=0.01)  # these as in arXiv 2103.00020
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=0.1)
    ids = tokenize(tokenizer, map(sample_record, range(len(images))), P_PRINCIPLE)  # (N, 24)
    held_out = range(HELD_OUT, HELD_OUT + 512)
    held_out_images, held_out_ids = render_images(held_out), tokenize(tokenizer, map(sample_record, held_out))

    def loss_of_batch():
        rows = torch.randint(len(images), (CLIP_BATCH,))
        with torch.no_grad():
            clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return contrastive_loss(clip.embed_images(to_float(images[rows])), clip.embed_texts(ids[rows]),
                                clip.logit_scale, ids[rows])

    return fit("clip", clip, loss_of_batch, CLIP_STEPS, folder,
               lambda clip, _: f"{retrieval_accuracy(clip, held_out_images, held_out_ids):.1f} % of 512 captions found")


def varied_record(seed):
    """All attributes are uniform and independent; a caption mentions most of them."""
    record, rng = uniform_record(seed), random.Random(f"specified {seed}")
    specified = {attribute for attribute, p in P_VARIED.items() if rng.random() < p}
    return replace(record, specified=frozenset(specified - {"skin"} if record.zombie else specified))


def fit_image_encoder(clip, tokenizer, folder):
    """Train the image encoder further on varied records, while the text encoder stays as it is -> CLIPModel.

    The skew of the toy dataset made it guess the gender from the profession. As LiT (arXiv 2111.07991), the other way.
    """
    records = [varied_record(VARIED_SEED + i) for i in range(VARIED_IMAGES)]
    images = stack(map(render, tqdm(records, "rendering", disable=None, leave=False)))
    ids = tokenize(tokenizer, records, p_absent=2 * P_ABSENT)
    with torch.no_grad():
        texts = torch.cat([clip.embed_texts(batch) for batch in ids.split(256)])  # (N, 64)
    parts = {"vision_model": clip.vision_model, "visual_projection": clip.visual_projection}
    networks = nn.ModuleDict(parts).requires_grad_(True)

    def loss_of_batch():
        rows = torch.randint(len(images), (CLIP_BATCH,))
        features = networks.visual_projection(networks.vision_model(to_float(images[rows])))
        return contrastive_loss(features, texts[rows], clip.logit_scale.detach(), ids[rows])

    averaged = fit("image-encoder", networks, loss_of_batch, VARIED_STEPS, folder, lambda *_: "")
    clip.vision_model, clip.visual_projection = averaged.vision_model, averaged.visual_projection
    return clip


# ── 2. The VAE ───────────────────────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
def psnr(vae, images):
    """Mean peak signal-to-noise ratio of the VAE's reconstructions of uint8 `images`, in dB."""
    x = to_float(images)
    reconstructed = vae.decode(vae.encode(x)[0]).clamp(-1, 1)
    mse = ((reconstructed - x) / 2).square().mean((1, 2, 3))  # (B,), for values within [0, 1]
    return -10 * mse.log10().mean().item()


def fit_vae(images, folder):
    """-> a VAE of the images, with the published scaling factor still."""
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG)
    held_out = render_images(range(HELD_OUT, HELD_OUT + 64))
    scale = VAE_CONFIG.scaling_factor

    def loss_of_batch():
        x = to_float(images[torch.randint(VAE_IMAGES, (VAE_BATCH,))])  # (B, 3, 64, 64)
        mean, logvar = vae.encode(x)
        reconstructed = vae.decode(sample_latent(mean, logvar)).float()
        mean, logvar = mean.float() / scale, logvar.float() - 2 * math.log(scale)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(reconstructed, x) + F.mse_loss(reconstructed, x) + KL_WEIGHT * kl

    return fit("vae", vae, loss_of_batch, VAE_STEPS, folder, lambda vae, _: f"{psnr(vae, held_out):.2f} dB")


@torch.no_grad()
def encode_images(vae, images, folder):
    """-> means and log-variances of the latents of all images, (N, 4, 16, 16) each, cached in the folder.

    Sets the VAE's scaling factor such that the means have unit variance.
    """
    def make(file):
        encoded = [torch.stack(vae.encode(to_float(batch))).half() for batch in tqdm(images.split(256), "encoding")]
        with atomic(file) as path:
            torch.save(torch.cat(encoded, dim=1), path)

    def read(file):
        encoded, side = check_tensors({"latents": unpickle(file)}, file)["latents"], SIZE // vae.config.factor
        if encoded.shape != (2, len(images), vae.config.latent_channels, side, side) or encoded.dtype != torch.half:
            raise ValueError(f"latents of {tuple(encoded.shape)} {encoded.dtype}")
        return encoded

    mean, logvar = cached(folder / "latents.pt", read, make).float()
    factor = 1 / mean.std().item()
    vae.config = replace(VAE_CONFIG, scaling_factor=VAE_CONFIG.scaling_factor * factor)
    return mean * factor, logvar + 2 * math.log(factor)


# ── 3. The UNet ──────────────────────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
def encode_captions(text_encoder, tokenizer, n):
    """The text encoder's last hidden state of all captions: (N, 24, C) float16. The first row is that of no caption."""
    ids = torch.cat([tokenizer([""]), tokenize(tokenizer, map(sample_record, range(n)))])
    return torch.cat([text_encoder(batch)[0].half() for batch in tqdm(ids.split(256), "encoding captions")])


def fit_unet(vae, text_encoder, tokenizer, images, folder):
    """Train the UNet on the frozen VAE and text encoder -> StableDiffusion."""
    mean, logvar = encode_images(vae, images, folder)
    contexts = encode_captions(text_encoder, tokenizer, len(images))
    schedule = Schedule(SCHEDULER)
    abar = schedule.alphas_cumprod

    torch.manual_seed(0)
    unet = UNet(UNET_CONFIG)

    def loss_of_batch():
        rows = torch.randint(len(images), (BATCH,))
        context = contexts[torch.where(torch.rand(BATCH) < PROMPT_DROP, 0, rows + 1)].float()  # (B, 24, C)
        z, t = sample_latent(mean[rows], logvar[rows]), torch.randint(len(abar), (BATCH,))
        eps, a = torch.randn_like(z), abar[t][:, None, None, None]  # (B, 1, 1, 1)
        eps_pred = unet(a.sqrt() * z + (1 - a).sqrt() * eps, t, context).float()
        return (schedule.min_snr_weight(t, SNR_GAMMA) * (eps_pred - eps).square().mean((1, 2, 3))).mean()

    def checkpoint(unet):
        return StableDiffusion(unet, vae, text_encoder, tokenizer, SCHEDULER | {"prediction_type": "epsilon"})

    def preview(averaged, step):
        sd, prompts = checkpoint(averaged), [prompt for prompt in PREVIEW for _ in PREVIEW]
        context, uncond = encode_prompts(sd, prompts), encode_prompts(sd, [""])
        images = sample_images(sd, context, uncond, range(len(prompts)), batch_size=32, steps=15, guidance=5,
                               sampler="dpm")
        path = folder / f"preview-{step:05}.png"
        grid(list(images)).save(path)
        return path

    return checkpoint(fit("unet", unet, loss_of_batch, STEPS, folder, preview, EMA_DECAY))


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────

def main():
    parser = Parser(description="Pretrain tiny-clip and tiny-sd, the checkpoints that this repository ships.")
    parser.add_argument("--out", type=Path, default=ROOT, help="where tiny-clip/ and tiny-sd/ are written; "
                        "they are replaced as a whole, but for livo.toml")
    parser.add_argument("--run", type=Path, default=Path("runs/pretrain"), help="state to resume from, previews")
    args = parser.parse_args()
    for folder in (args.run, args.out):
        check_writable(folder)
    make_folder(args.run)
    keep_freed_memory(large=True)
    images = render_images(range(IMAGES))
    captions = [write_caption(sample_record(seed), 0, P_ABSENT) for seed in range(IMAGES)]
    tokenizer = train_tokenizer([*captions, *VOCABULARY * 200], TEXT_CONFIG.vocab_size, TOKENS)
    clip = fit_image_encoder(fit_clip(tokenizer, images, args.run), tokenizer, args.run).eval()
    save_clip(clip, tokenizer, PREPROCESSOR, args.out / "tiny-clip")
    vae = fit_vae(images, args.run).eval()
    text_encoder = CLIPTextModel(TEXT_CONFIG)
    text_encoder.text_model.load_state_dict(clip.text_model.state_dict())
    sd = fit_unet(vae, text_encoder, tokenizer, images, args.run)
    save(sd, args.out / "tiny-sd", preset=ROOT / "tiny-sd" / "livo.toml")
    print(f"tiny-clip and tiny-sd are in {args.out}")


if __name__ == "__main__":
    run(main)
