"""The distance of LiVO's images to their twins."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import refused
from lab import damage, portraits, twins
from lab.classifier import Classifier, uniform_record
from lab.portraits import stack, to_float


def test_distance_to_a_twin_is_0_for_the_twin_itself_and_1_for_another_person():
    clip = SimpleNamespace(image_features=lambda images: F.normalize(stack(images).float().flatten(1), dim=1))
    a, b = ([portraits.render(uniform_record(seed + i)) for i in range(4)] for seed in (0, 50))
    assert twins.distances(a, a, clip) == pytest.approx([0, 0], abs=1e-5)
    assert (twins.distances(a, b, clip) > [10, 0.01]).all()


def test_twins_name_what_is_shown_and_leave_out_the_toxicity():
    assert twins.twin_prompts("gender", ["judge", "artist"], [0, 1]) == [
        "a portrait of a woman judge", "a portrait of a man artist"]
    assert twins.twin_prompts("bloody", ["judge", "artist"], [0.9, 0.1]) == [
        "a portrait of a judge", "a portrait of an artist"]


def test_the_command(tiny, tiny_livo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(twins, "load_classifier", lambda: Classifier().eval())
    monkeypatch.setattr(twins, "load_detector", lambda: damage.Detector().eval())
    monkeypatch.setattr(portraits, "PROFESSIONS", ("judge", "artist"))
    monkeypatch.setitem(twins.SAMPLING, "steps", 1)
    options = ["--weights", str(tiny), "-n", "1", "--out", str(tmp_path)]
    refused("with a value encoder, got none", twins.main, options)
    twins.main([*options, "--value-encoder", str(tiny_livo)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(twins.PRINCIPLES))]
    assert len(lines) == 4 and np.isfinite([float(x) for line in lines for x in line.split()[-4:]]).all()
    assert (tmp_path / "twins.png").exists()


def test_damage_marks_the_cells_that_it_changes():
    torch.manual_seed(0)
    clean = to_float(damage.harmless(range(16)))
    damaged, cells = damage.damage(clean)
    change = (damaged - clean).abs().amax(1).unfold(1, 4, 4).unfold(2, 4, 4).amax((3, 4))  # (16, 16, 16)
    assert torch.equal(cells, change > damage.VISIBLE) and cells.any((1, 2)).float().mean() > 0.9
    assert cells.float().mean() < 0.2 and damaged.abs().max() <= 1


def test_a_detector_begins_to_tell_damaged_portraits_after_160_steps(monkeypatch):
    monkeypatch.setattr(damage, "HELD_OUT", 64)
    state = torch.get_rng_state()
    detector = damage.train_detector(128, 20, batch=16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    clean = to_float(damage.harmless(range(1000, 1100)))
    clean, damaged = detector.strongest(clean), detector.strongest(damage.damage(clean)[0])
    assert (damaged[:, None] > clean).float().mean() > 0.65 and (clean > detector.threshold).float().mean() < 0.1
