
import math
import re
from dataclasses import replace

import torch

import diffusers
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lab import portraits
from lab import pretrain
import sample
import weights
from conftest import TOKENIZER


# ── portraits.py, pretrain.py, tiny-sd ─────────────────────────────────────────────────────────────────────────

def test_one_seed_makes_the_record_its_caption_and_its_picture():
    for seed in range(40):
        record = portraits.sample_record(seed)
        assert record == portraits.sample_record(seed)
        assert portraits.render(record).tobytes() == portraits.render(portraits.sample_record(seed)).tobytes()
        words = set(re.findall("[a-z]+", portraits.write_caption(record)))
        assert (record.gender in words or {"woman": "female", "man": "male"}[record.gender] in words) \
            == ("gender" in record.named)
        assert (record.skin in words) == ("skin" in record.named)
        assert (set(record.profession.split()) <= words) == ("profession" in record.named)
        assert (bool(words & {"bloody", "blood"}), "zombie" in words, bool(words & {"smoking", "smokes"})) \
            == (record.bloody, record.zombie, record.smoking)


def test_open_attributes_are_skewed_as_stated_and_named_ones_are_uniform():
    records = [portraits.sample_record(seed) for seed in range(20_000)]

    def assert_share(hits, expected):
        n = len(hits)
        assert abs(sum(hits) / n - expected) < 4 * math.sqrt(expected * (1 - expected) / n)

    for profession, share in portraits.MAN_SHARE.items():
        mine = [record for record in records if record.profession == profession]
        assert_share([r.gender == "man" for r in mine if "gender" not in r.named], share)
    assert_share([r.gender == "man" for r in records if "gender" in r.named], 0.5)
    for skin, share in portraits.SKIN_SHARE.items():
        assert_share([r.skin == skin for r in records if "skin" not in r.named], share)
        assert_share([r.skin == skin for r in records if "skin" in r.named], 0.2)


def test_an_attribute_changes_its_own_pixels_only():
    record = replace(portraits.sample_record(3), profession="chef", gender="man", skin="light", bloody=False,
                     zombie=False, smoking=False)
    plain = np.asarray(portraits.render(record), int)
    for change in ({"bloody": True}, {"smoking": True}, {"zombie": True}, {"skin": "tan"}, {"gender": "woman"}):
        changed = np.abs(np.asarray(portraits.render(replace(record, **change)), int) - plain).max(-1) > 0
        assert 20 < changed.sum() < 64 * 64 / 2 and not changed[:8].any()


def test_tiny_sd_is_small_and_diffusers_draws_the_same(tmp_path):
    folder = TOKENIZER.parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    for path in folder.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    theirs = pipe("a zombie chef", num_inference_steps=9, num_images_per_prompt=2, generator=[
        torch.Generator().manual_seed(seed) for seed in (4, 5)]).images
    sample.main(["--prompt", "a zombie chef", "--principle", "none", "--steps", "9", "-n", "2", "--seed", "4",
                 "--dtype", "fp32", "--out", str(tmp_path)])
    for i, image in enumerate(theirs):
        ours = Image.open(tmp_path / f"{i:04}.png")
        assert np.abs(np.asarray(ours, int) - np.asarray(image, int)).max() <= 1


def test_tiny_sd_copies_unseen_pictures_at_30_db():
    vae = weights.load(TOKENIZER.parent).vae
    assert pretrain.psnr(vae, pretrain.render_images(range(pretrain.HELD_OUT + 500, pretrain.HELD_OUT + 532))) > 30


def test_pretraining_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)

    def train_until(steps, folder):
        torch.manual_seed(0)
        network = nn.Linear(3, 3)

        def loss():
            if steps == "die" and len(list(folder.iterdir())) == 1:
                raise KeyboardInterrupt
            return network(torch.randn(4, 3)).square().mean()

        folder.mkdir(exist_ok=True)
        return pretrain.fit("n", network, loss, 6, folder, lambda *_: "", 0.5)

    whole = train_until(6, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_until("die", tmp_path / "parts")
    resumed = train_until(6, tmp_path / "parts")
    assert torch.equal(whole.weight, resumed.weight) and not torch.equal(whole.weight, torch.zeros(3, 3))
