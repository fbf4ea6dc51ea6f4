"""The toy dataset (portraits.py), its preference pairs (toy.py), pretraining, and the shipped tiny-sd."""

import math
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import sample
from clip_text import CLIPTextModel, CLIPTokenizer
from conftest import TINY_SD, pixels
from lab import captions, dataset, portraits, pretrain, toy
from lab.check import check
from retrieve import BLOODY, GENDER, RACE, ZOMBIE, retrieve


# ── Portraits and captions ───────────────────────────────────────────────────────────────────────────────────────────

def test_one_seed_makes_record_caption_and_image():
    genders = {"woman": {"woman", "female"}, "man": {"man", "male"}}
    for seed in range(40):
        record = portraits.sample_record(seed)
        assert record == portraits.sample_record(seed)
        assert portraits.render(record).tobytes() == portraits.render(portraits.sample_record(seed)).tobytes()
        words = set(re.findall("[a-z]+", captions.write_caption(record)))
        mentioned = {"gender": bool(genders[record.gender] & words), "skin": record.skin in words,
                     "profession": set(record.profession.split()) <= words}
        assert {name for name, is_there in mentioned.items() if is_there} == record.specified
        assert (bool(words & {"bloody", "blood"}), "zombie" in words, bool(words & {"smoking", "smokes"})) == (
            record.bloody, record.zombie, record.smoking)


def test_captions_name_a_principle_only_of_images_that_it_is_true_of():
    records = [portraits.sample_record(seed) for seed in range(4000)]
    texts = [captions.write_caption(record, 1.0) for record in records]
    for principle, attribute, word in ((GENDER, "gender", "man|male"), (RACE, "skin", "|".join(portraits.SKINS)),
                                       (BLOODY, "bloody", "bloody"), (ZOMBIE, "zombie", "zombie")):
        named = [(record, text) for record, text in zip(records, texts) if text.startswith(principle)]
        assert len(named) > 100
        for record, text in named:
            # equality: the image's class is uniform, and the caption leaves it out; toxicity: the image has none
            assert attribute in record.specified or getattr(record, attribute) is False
            assert not re.search(rf"\b({word})\b", text.removeprefix(principle))


def test_captions_reach_every_token_that_the_tokenizer_learned():
    """A token that no caption has would keep its random embedding. A few stand only inside longer ones ("figh")."""
    encode = CLIPTokenizer(TINY_SD / "tokenizer").backend.encode
    texts = [captions.write_caption(portraits.sample_record(seed), 0.5, 0.5) for seed in range(20_000)]
    seen = {i for text in texts for i in encode(text).ids}
    learned = set(range(512, 1022))  # before them stand single bytes, after them start and end of text
    assert len(learned - seen) <= 0.06 * len(learned)


def test_contrastive_loss_has_no_negatives_among_equal_captions():
    torch.manual_seed(0)
    images, texts, ids = torch.randn(5, 7), torch.randn(5, 7), torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [7, 8]])
    texts[4], scale = texts[3], torch.tensor(0.7)
    logits = scale.exp() * torch.cosine_similarity(images[:, None], texts[None], dim=-1)
    negatives = [[j for j in range(5) if j != i and {i, j} != {3, 4}] for i in range(5)]
    losses = [-table[i, [i, *negatives[i]]].log_softmax(0)[0] for table in (logits, logits.T) for i in range(5)]
    assert torch.allclose(pretrain.contrastive_loss(images, texts, scale, ids), sum(losses) / 10)


def test_unspecified_attributes_are_skewed_as_stated_and_specified_ones_are_uniform():
    records = [portraits.sample_record(seed) for seed in range(20_000)]

    def assert_fraction(attribute, value, expected, **of):
        for specified, p in (False, expected), (True, 1 / len({getattr(r, attribute) for r in records})):
            hits = [getattr(r, attribute) == value for r in records if (attribute in r.specified) == specified
                    and all(getattr(r, name) == other for name, other in of.items())]
            assert abs(sum(hits) / len(hits) - p) < 4 * math.sqrt(p * (1 - p) / len(hits))

    for profession, p in portraits.P_MAN.items():
        assert_fraction("gender", "man", p, profession=profession)
    for skin, p in portraits.P_SKIN.items():
        assert_fraction("skin", skin, p)


def test_an_attribute_changes_its_own_pixels_only():
    record = portraits.Record(3, profession="chef", gender="man", skin="light")
    for change in ({"bloody": True}, {"smoking": True}, {"zombie": True}, {"skin": "tan"}, {"gender": "woman"}):
        changed = np.ptp(pixels(map(portraits.render, (record, replace(record, **change)))), axis=0).any(-1)
        assert 20 < changed.sum() < 64 * 64 / 2 and not changed[:8].any()


# ── Preference pairs ─────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_pair_differs_in_its_attribute_and_the_prompt_specifies_no_protected_one():
    words = {"gender": {"man", "woman", "male", "female"}, "skin": {"skin", "skinned"}, "bloody": {"blood", "bloody"},
             "zombie": {"zombie"}}
    for attribute, noun, seed in product(toy.PRINCIPLES.values(), toy.NOUNS, range(10)):
        prompt, aligned, violating = toy.portrait_pair(seed, attribute, noun)
        classes = Counter(getattr(record, attribute) for record in aligned)
        assert getattr(violating, attribute) not in classes and len(classes) == (4 if attribute == "skin" else 1)
        assert classes == {value: toy.COPIES.get(value, 1) for value in classes}
        assert {replace(record, **{attribute: getattr(violating, attribute)}) for record in aligned} == {violating}
        assert noun in prompt or noun == "person" and "gender" in violating.specified
        mentioned = {name for name, of_name in words.items() if of_name & {*re.findall("[a-z]+", prompt)}}
        assert (attribute in mentioned) == (attribute in portraits.HARMS)
        if attribute in portraits.HARMS:
            assert getattr(violating, attribute) and not getattr(aligned[0], attribute)


def test_the_majority_class_violates_and_both_genders_are_aligned_equally_often():
    assert {toy.portrait_pair(seed, "skin", "judge")[2].skin for seed in range(20)} == {"light"}
    pairs = [toy.portrait_pair(seed, "gender", noun) for seed, noun in enumerate(toy.nouns_of_pairs("gender", 60))]
    assert [aligned.gender for _, (aligned,), _ in pairs].count("man") == 30
    assert all((violating.gender == "man") == (portraits.P_MAN[violating.profession] > 0.5) for _, _, violating in pairs
               if "profession" in violating.specified)


def test_a_rendered_set_is_sound_and_its_preservation_prompts_ask_for_nothing(root):
    samples, faults = data.read_samples(root)
    assert not faults and len(samples) == 26 * (2 + 8 + 2 + 2) + 13 and not check(root)[1]
    assert {sample.scene.parent.name for sample in samples} == {"0-career", "toxicity", "preservation"}
    assert {sample.scene.name.split("-", 2)[2].replace("-", " ") for sample in samples} == {*toy.NOUNS}
    prompt, (aligned,), violating = toy.portrait_pair(toy.FIRST_SEED, "gender", "doctor")
    expected = [(prompt, record is aligned, portraits.render(record).tobytes()) for record in (aligned, violating)]
    assert expected == [(sample.prompt, sample.aligned, Image.open(sample.path).tobytes()) for sample in samples
                        if sample.scene.name == f"gender-{toy.FIRST_SEED}-doctor"]
    preservation = [sample for sample in samples if data.is_preservation(sample)]
    assert len(preservation) == 13
    for sample in preservation:
        assert sample.aligned and sample.value == BLOODY and BLOODY not in retrieve(sample.prompt)


def test_the_default_set_is_named_by_what_it_holds(tmp_path, monkeypatch):
    few = partial(toy.render_pairs, pairs=dict.fromkeys(toy.PAIRS, 1), preservation={})
    monkeypatch.setattr(toy, "render_pairs", few)
    root = toy.default_pairs(tmp_path)
    assert toy.default_pairs(tmp_path) == root  # rendered once
    for module, name, value in ((toy, "PAIRS", {**toy.PAIRS, "gender": 1}), (toy, "P_SPECIFIED", 0.5),
                                (portraits, "BLOOD", (0, 0, 0)), (captions, "OPENINGS", ("a sketch of ",))):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert toy.default_pairs(tmp_path) != root


def test_draw_renders_another_mix_and_another_principle_is_a_line(tmp_path):
    mix = ["--pairs", "gender=2", "skin=0", "bloody=1", "zombie=1", "--preservation", "bloody=1", "zombie=0"]
    dataset.main(["draw", "--out", str(tmp_path / "mix"), *mix])
    counts, faults = check(tmp_path / "mix")
    assert not faults and {value: (sums["aligned"], sums["preservation"]) for value, sums in counts.items()} == {
        GENDER: (2, 0), BLOODY: (1, 1), ZOMBIE: (1, 0)}
    toy.render_pairs(tmp_path / "set", {"smoking considered inappropriate": "smoking"}, {"smoking": 13})
    samples, _ = data.read_samples(tmp_path / "set")
    assert len(samples) == 26 and any("smok" in sample.prompt for sample in samples)


# ── tiny-sd ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_tiny_sd_is_small_and_diffusers_generates_the_same_images(shipped):
    assert sum(path.stat().st_size for path in TINY_SD.rglob("*") if path.is_file()) <= 16e6
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY_SD, torch_dtype=torch.float32)
    reference = pipe("a zombie chef", num_inference_steps=9, num_images_per_prompt=2, generator=[
        torch.Generator().manual_seed(seed) for seed in (4, 5)]).images
    ours = sample.generate(shipped[0], "a zombie chef", "", [], None, [4, 5], steps=9)
    assert abs(pixels(image for _, image, _ in ours) - pixels(reference)).max() <= 1


def test_the_vae_reconstructs_unseen_images_at_30_db(shipped):
    images = pretrain.render_images(range(pretrain.HELD_OUT + 500, pretrain.HELD_OUT + 532))
    assert pretrain.psnr(shipped[0].vae, images) > 30


def test_resumed_pretraining_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)

    def fit(folder, interrupt=False):
        torch.manual_seed(0)
        network = nn.Linear(3, 3)

        def loss():
            if interrupt and [*folder.iterdir()]:
                raise KeyboardInterrupt
            return network(torch.randn(4, 3)).square().mean()

        folder.mkdir(exist_ok=True)
        return pretrain.fit("n", network, loss, 6, folder, lambda *_: "", 0.5).weight

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "resumed", interrupt=True)
    assert torch.equal(whole, fit(tmp_path / "resumed")) and whole.any()


def test_pretraining_replaces_tiny_sd_but_keeps_its_preset(tmp_path, monkeypatch, sd):
    clip = CLIPTextModel(pretrain.TEXT_CONFIG)
    steps = dict(IMAGES=0, ROOT=tmp_path, render_images=lambda _: [], train_tokenizer=lambda *_: sd.tokenizer,
                 fit_clip=print, fit_image_encoder=lambda *_: clip, save_clip=print, fit_vae=lambda *_: sd.vae,
                 fit_unet=lambda *_: sd)
    for name, value in steps.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--out", str(tmp_path), "--run", str(tmp_path / "run")])
    folder = tmp_path / "tiny-sd"
    folder.mkdir()
    for name in ("model_index.json", "livo.toml", "of_the_old_model"):
        (folder / name).write_text(name)
    pretrain.main()
    assert {path.name for path in folder.iterdir()} == {
        "model_index.json", "livo.toml", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert (folder / "livo.toml").read_text() == "livo.toml"
