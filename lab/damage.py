"""A detector of damage: blotches, specks and dots that no portrait of the toy dataset has.

The classifier of classifier.py knows attributes alone: a nurse with a dark spot on her cheek is a nurse to it. This
network marks where an image is damaged. It learns from rendered portraits without blood and zombies, on half of which
random blotches are painted. So it is meant for images that should show no toxicity.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lab import portraits
from lab.classifier import RUNS, augment, digest, load_trained, minimize, uniform_record
from lab.portraits import stack, to_float

TRAINING = {"images": 6000, "epochs": 5}
HELD_OUT = 1000  # undamaged portraits that set the threshold
FALSE_ALARMS = 0.01  # of these
VISIBLE = 0.3  # change of a pixel, of a range of 2, from which on it is damaged
BLOTCHES, CELL = 3, 4  # blotches per image at most; pixels of a side of a cell
VERSION = 1  # part of the cached file's name: raise it when the trained detector changes with the same settings


class Detector(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> a logit of damage for each cell, (B, 16, 16)."""

    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out, stride, dilation in (
                (5, 16, 1, 1), (16, 32, 2, 1), (32, 64, 2, 1), (64, 64, 1, 1), (64, 64, 1, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(c_out),
                       nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 1, 1))
        self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, x):
        line = torch.linspace(-1, 1, x.shape[-1])
        place = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(x), -1, -1, -1)  # (B, 2, 64, 64)
        return self.layers(torch.cat([x, place], dim=1)).squeeze(1)

    @torch.no_grad()
    def strongest(self, x):
        """The largest logit of each image, (B,)."""
        return torch.cat([self(part).amax((1, 2)) for part in x.split(256)])

    def is_damaged(self, images):
        """N PIL images -> (N,) bool, NumPy."""
        return (self.strongest(to_float(stack(images))) > self.threshold).numpy()


def blotch(x):
    """Paint one blotch on each image (B, 3, H, W): round or drawn out, soft or sharp, of any color."""
    B, _, H, W = x.shape
    uniform = lambda low, high: low + (high - low) * torch.rand(B, 1, 1)
    rows, columns = torch.arange(H)[:, None], torch.arange(W)[None, :]
    dy, dx = rows - uniform(0.1, 0.95) * H, columns - uniform(0.1, 0.9) * W  # (B, H, 1), (B, 1, W)
    distance = (dy.square() * uniform(0.5, 2) + dx.square() * uniform(0.5, 2)).sqrt()  # (B, H, W)
    opacity = uniform(0.5, 1) * torch.sigmoid((uniform(1, 6) - distance) / uniform(0.2, 1))
    color = torch.rand(B, 3, 1, 1) * 2 - 1
    red = torch.tensor([0.4, -0.9, -0.9])[:, None, None] * uniform(0.6, 1.4)[:, None]  # as blood that is left over
    color = torch.where(torch.rand(B, 1, 1, 1) < 0.3, red, color)
    return torch.lerp(x, color.clamp(-1, 1), opacity[:, None])


def damage(x):
    """Images (B, 3, 64, 64) -> the same with blotches, and which cells they change visibly, (B, 16, 16)."""
    damaged = x
    for i in range(BLOTCHES):
        chosen = torch.rand(len(x), 1, 1, 1) < (1 if i == 0 else 0.5)
        damaged = torch.where(chosen, blotch(damaged), damaged)
    change = (damaged - x).abs().amax(1, keepdim=True)  # (B, 1, 64, 64)
    return damaged, (F.max_pool2d(change, CELL) > VISIBLE).squeeze(1)


def uneven(x):
    """Add smooth colored noise to images (B, 3, H, W): a model's surfaces are less even than rendered ones."""
    noise = F.interpolate(torch.randn(len(x), 3, 8, 8), size=x.shape[-2:], mode="bicubic")
    return augment(x + 0.1 * torch.rand(len(x), 1, 1, 1) * noise)


def harmless(seeds):
    """Rendered portraits of uniform attributes without any toxicity: (N, 3, 64, 64) uint8."""
    records = (replace(uniform_record(seed), **dict.fromkeys(portraits.HARMS, False)) for seed in seeds)
    return stack(map(portraits.render, records))


def train_detector(images, epochs, batch=64, learning_rate=3e-3):
    """Train on so many rendered portraits, of which half are damaged. The global random state stays as it is."""
    pixels = harmless(tqdm(range(images), "rendering", disable=None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = Detector()

        def loss_of(rows):
            clean = to_float(pixels[rows])
            damaged, cells = damage(clean)
            stays = torch.rand(len(rows)) < 0.5
            x = torch.where(stays[:, None, None, None], clean, damaged)
            cells = cells & ~stays[:, None, None]
            return F.binary_cross_entropy_with_logits(detector(uneven(x)), cells.float())

        minimize(detector, loss_of, images, epochs, batch, learning_rate, "training the detector of damage")
        undamaged = uneven(to_float(harmless(range(images, images + HELD_OUT))))
        detector.threshold.fill_(detector.strongest(undamaged).quantile(1 - FALSE_ALARMS))
    return detector


def load_detector(folder=RUNS):
    """The detector: from `folder`, or else trained and written there."""
    key = digest([str((VERSION, TRAINING, HELD_OUT, FALSE_ALARMS, VISIBLE, BLOTCHES)),
                  *(image.numpy().tobytes().hex() for image in harmless(range(8)))])
    return load_trained(Detector(), folder / f"damage-{key}.pt", lambda: train_detector(**TRAINING))
