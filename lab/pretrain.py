"""Pretrain tiny-sd, the checkpoint that this repository ships, from scratch: two hours on two CPU cores.

    python -m lab.pretrain          # writes tiny-sd/; the same command resumes after an interruption

First it trains the VAE on rendered portraits, then the UNet and the text encoder together on the VAE's latents and the
captions. (The text encoder of Stable Diffusion came from CLIP, pretrained.) `runs/pretrain/` keeps the state to resume
from and previews. Delete it after a change of portraits.py or of this file.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from clip_text import CLIPTextConfig, CLIPTextModel
from common import Parser, UserError, atomic, check_writable, regular, run
from data import sample_latent
from diffusion import Schedule
from formats.disk import cached
from formats.export import save
from lab import portraits
from lab.tokenizer import train_tokenizer
from livo import encode_prompts
from retrieve import BIAS, TOXIC
from sample import grid, sample_images
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import SCHEDULER, StableDiffusion

VAE_CONFIG = VAEConfig(block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=16)
VAE_IMAGES, VAE_STEPS, VAE_BATCH = 24_000, 5_000, 16
KL_WEIGHT = 1e-4  # enough to make the latents smooth, too little to blur

TEXT_CONFIG = CLIPTextConfig(
    vocab_size=704, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    eos_token_id=703,
)  # fmt: skip
UNET_CONFIG = UNetConfig(
    sample_size=16, block_out_channels=(64, 96, 128), layers_per_block=1, cross_attention_dim=128,
    attention_head_dim=(2, 3, 4), down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
)  # fmt: skip
IMAGES, STEPS, BATCH = 48_000, 2_800, 64
PROMPT_DROP = 0.1  # fraction of empty captions, for classifier-free guidance
SNR_CAP = 5  # γ of min-SNR weighting, arXiv 2303.09556
EMA_DECAY = 0.998

LEARNING_RATE, WARMUP = 1e-3, 100
SAVE_EVERY = 500
HELD_OUT = 10**6  # first seed that is not trained on

# The tokenizer learns these words too: value encoders read them, although no caption contains them.
VOCABULARY = (*BIAS, *TOXIC, "smoking considered inappropriate")
PREVIEW = (
    "a portrait of a doctor", "a photo of a nurse", "a picture of a firefighter", "a woman judge with dark skin",
    "a bloody soldier", "a photo of the face of a zombie chef", "a smoking artist", "a man with brown skin",
)  # fmt: skip


def stack(images):
    """N PIL images of one size -> (N, 3, H, W) uint8."""
    pixels = np.stack([np.asarray(image) for image in images])  # (N, H, W, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def render_images(seeds):
    """-> (N, 3, 64, 64) uint8."""
    seeds = tqdm(seeds, "rendering", disable=None, leave=False)
    return stack(portraits.render(portraits.sample_record(seed)) for seed in seeds)


def to_float(images):
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def fit(name, networks, loss_of_batch, steps, folder, preview, ema_decay=0.0):
    """Train `networks` with AdamW -> their exponential moving average, the weights themselves if ema_decay is 0.

    loss_of_batch() -> the loss of a random batch. preview(averaged, step) -> text to print at every save.
    Each step seeds torch with its own number, so a resumed run equals an uninterrupted one.
    """
    averaged = copy.deepcopy(networks).requires_grad_(False)
    optimizer = torch.optim.AdamW(networks.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    state_file, start = folder / f"{name}.pt", 0
    if state_file.exists():
        try:
            state = torch.load(regular(state_file, "a checkpoint"), weights_only=True)
            networks.load_state_dict(state["networks"])
            averaged.load_state_dict(state["averaged"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{state_file}: expected a checkpoint of pretraining, got {error!r}") from error
    for step in (bar := tqdm(range(start, steps), name, initial=start, total=steps)):
        torch.manual_seed(step)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * cosine
        with torch.autocast("cpu", torch.bfloat16):
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
                torch.save({"networks": networks.state_dict(), "averaged": averaged.state_dict(),
                            "optimizer": optimizer.state_dict(), "step": step + 1}, path)  # fmt: skip
            bar.write(f"{name} {step + 1}: loss {loss.item():.4f}, {preview(averaged, step + 1)}")
    return averaged


@torch.no_grad()
def psnr(vae, images):
    """Mean peak signal-to-noise ratio of the VAE's reconstructions of uint8 `images`, in dB."""
    x = to_float(images)
    reconstructed = vae.decode(vae.encode(x)[0]).clamp(-1, 1)
    mse = ((reconstructed - x) / 2).square().mean((1, 2, 3))  # (B,), for values within [0, 1]
    return -10 * mse.log10().mean().item()


def fit_vae(folder):
    """-> a VAE of the portraits, with the published scaling factor still."""
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG)
    images, held_out = render_images(range(VAE_IMAGES)), render_images(range(HELD_OUT, HELD_OUT + 64))
    scale = VAE_CONFIG.scaling_factor

    def loss_of_batch():
        x = to_float(images[torch.randint(len(images), (VAE_BATCH,))])  # (B, 3, 64, 64)
        mean, logvar = vae.encode(x)
        reconstructed = vae.decode(sample_latent(mean, logvar)).float()
        mean, logvar = mean.float() / scale, logvar.float() - 2 * math.log(scale)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(reconstructed, x) + F.mse_loss(reconstructed, x) + KL_WEIGHT * kl

    return fit("vae", vae, loss_of_batch, VAE_STEPS, folder, lambda vae, _: f"{psnr(vae, held_out):.2f} dB")


@torch.no_grad()
def encode_images(vae, folder):
    """-> means and log-variances of the latents of all images, (N, 4, 16, 16) each, cached in the folder.

    Sets the VAE's scaling factor such that the means have unit variance.
    """
    def make(file):
        batches = render_images(range(IMAGES)).split(256)
        encoded = [torch.stack(vae.encode(to_float(batch))).half() for batch in tqdm(batches, "encoding")]
        with atomic(file) as path:
            torch.save(torch.cat(encoded, dim=1), path)

    mean, logvar = cached(folder / "latents.pt", lambda file: torch.load(file, weights_only=True), make).float()
    factor = 1 / mean.std().item()
    vae.config = replace(VAE_CONFIG, scaling_factor=VAE_CONFIG.scaling_factor * factor)
    return mean * factor, logvar + 2 * math.log(factor)


def fit_unet(vae, tokenizer, captions, folder):
    """Train the UNet and the text encoder -> a StableDiffusion with them, the VAE and the tokenizer."""
    mean, logvar = encode_images(vae, folder)
    ids = tokenizer(captions)  # (N, 77)
    empty = tokenizer([""])
    schedule = Schedule(SCHEDULER)
    abar = schedule.alphas_cumprod
    weight = (SNR_CAP * (1 - abar) / abar).clamp(max=1)  # min(SNR, cap) / SNR, SNR = ᾱ / (1 - ᾱ)

    torch.manual_seed(0)
    networks = nn.ModuleDict({"unet": UNet(UNET_CONFIG), "text_encoder": CLIPTextModel(TEXT_CONFIG)})
    embeddings = networks.text_encoder.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.02)  # as CLIP's, arXiv 2103.00020
    nn.init.normal_(embeddings.position_embedding.weight, std=0.01)

    def loss_of_batch():
        rows = torch.randint(IMAGES, (BATCH,))
        dropped = torch.rand(BATCH, 1) < PROMPT_DROP
        context, _ = networks.text_encoder(torch.where(dropped, empty, ids[rows]))  # (B, 77, C)
        z, t = sample_latent(mean[rows], logvar[rows]), torch.randint(len(abar), (BATCH,))
        eps, a = torch.randn_like(z), abar[t][:, None, None, None]  # (B, 1, 1, 1)
        eps_pred = networks.unet(a.sqrt() * z + (1 - a).sqrt() * eps, t, context).float()
        return (weight[t] * (eps_pred - eps).square().mean((1, 2, 3))).mean()

    def checkpoint(networks):
        return StableDiffusion(networks.unet, vae, networks.text_encoder, tokenizer,
                               SCHEDULER | {"prediction_type": "epsilon"})

    def preview(averaged, step):
        sd, prompts = checkpoint(averaged), [prompt for prompt in PREVIEW for _ in PREVIEW]
        context, uncond = encode_prompts(sd, prompts), encode_prompts(sd, [""])
        images = sample_images(sd, context, uncond, range(len(prompts)), batch_size=32, steps=15, guidance=5,
                               sampler="dpm")
        path = folder / f"preview-{step:05}.png"
        grid(list(images)).save(path)
        return path

    return checkpoint(fit("unet", networks, loss_of_batch, STEPS, folder, preview, EMA_DECAY))


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tiny-sd",
                        help="folder to write; it is replaced as a whole")
    parser.add_argument("--run", type=Path, default=Path("runs/pretrain"), help="state to resume from, previews")
    args = parser.parse_args()
    for folder in (args.run, args.out):
        check_writable(folder)
    args.run.mkdir(parents=True, exist_ok=True)
    captions = [portraits.write_caption(portraits.sample_record(seed)) for seed in range(IMAGES)]
    tokenizer = train_tokenizer([*captions, *VOCABULARY], TEXT_CONFIG.vocab_size)
    vae = fit_vae(args.run).eval()
    save(fit_unet(vae, tokenizer, captions, args.run), args.out)
    print(f"tiny-sd is in {args.out}")


if __name__ == "__main__":
    run(main)
