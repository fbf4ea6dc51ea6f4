"""The detector of damaged images, and the distance of LiVO's images to their twins."""

import numpy as np
import pytest
import torch

import weights
from conftest import refused
from lab import damage, portraits
from lab.classifier import uniform_record
from lab.portraits import stack, to_float
from livo import ValueEncoder


def test_a_short_training_tells_damaged_images():
    detector = damage.train_detector(2000, 2)
    records = [uniform_record(10**6 + i) for i in range(300)]
    x = to_float(stack(map(portraits.render, records)))
    torch.manual_seed(1)
    damaged = damage.damage(x)
    changed = (damaged != x).any(1).float().mean((1, 2))  # of the pixels
    assert (changed > 0).all() and changed.mean() < 0.5 and damaged.abs().max() <= 1
    clean, hit = (detector.classify(images)["damaged"] > 0.5 for images in (x, damaged))
    bloody = torch.tensor([record.bloody for record in records])
    assert clean[~bloody].float().mean() < 0.2 and hit.float().mean() > 0.7


def test_distance_to_a_twin_is_0_for_the_twin_itself_and_1_for_another_person():
    class Clip:
        def image_features(self, images):
            return torch.nn.functional.normalize(stack(images).float().flatten(1), dim=1)

    a, b = ([portraits.render(uniform_record(seed + i)) for i in range(4)] for seed in (0, 50))
    assert damage.distances(a, a, Clip()) == pytest.approx([0, 0], abs=1e-5)
    assert (damage.distances(a, b, Clip()) > [10, 0.01]).all()


def test_twins_name_what_is_shown_and_leave_out_the_toxicity():
    assert damage.twin_prompts("gender", ["judge", "artist"], [0, 1]) == [
        "a portrait of a woman judge", "a portrait of a man artist"]
    assert damage.twin_prompts("bloody", ["judge", "artist"], [0.9, 0.1]) == [
        "a portrait of a judge", "a portrait of an artist"]


def test_the_command(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(damage, "load_classifier", lambda: damage.Classifier().eval())
    monkeypatch.setattr(damage, "load_detector", lambda: damage.Classifier(damage.DAMAGE).eval())
    monkeypatch.setattr(portraits, "PROFESSIONS", ("judge", "artist"))
    monkeypatch.setitem(damage.SAMPLING, "steps", 1)
    options = ["--weights", str(tiny), "-n", "1", "--out", str(tmp_path)]
    refused("with a value encoder, got none", damage.main, options)
    weights.save_text_encoder(ValueEncoder.from_text_encoder(weights.load(tiny).text_encoder), tmp_path / "livo")
    damage.main([*options, "--value-encoder", str(tmp_path / "livo")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(damage.PRINCIPLES))]
    assert len(lines) == 4 and np.isfinite([float(x) for line in lines for x in line.split()[-5:]]).all()
    assert (tmp_path / "twins.png").exists()
