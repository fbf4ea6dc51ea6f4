"""The distance of LiVO's images to their twins, and LiVO on unseen wordings."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import refused
from lab import captions, damage, portraits, twins, wordings
from lab.classifier import Classifier, uniform_record
from lab.portraits import stack, to_float
from lab.toy import PRINCIPLES
from retrieve import BLOODY


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


# ── Wordings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_prompts_of_a_wording():
    assert wordings.write_prompts("the {} at work")[0] == f"the {portraits.PROFESSIONS[0]} at work"
    assert "an artist, happy" in wordings.write_prompts("{a}, happy")
    assert "a bloody artist, happy" in wordings.write_prompts("{a}, happy", "bloody")


def test_no_caption_has_these_wordings():
    """Beyond the plain prompt, each has a word that no caption has."""
    known = {word for text in [*captions.OPENINGS, *captions.WORDS["adjectives"], *captions.WORDS["clauses"]]
             for word in text.split()}
    for wording in wordings.WORDINGS[1:]:
        assert set(wording.replace(",", "").split()) - known - {"{}", "{a}"}, wording


def test_a_wording_is_measured_by_profession(monkeypatch):
    """A stand-in reads the brightness: 0 without a value token, 200 with it and blood, 255 with it and without."""
    def read(images):
        bright = stack(images).float().mean((1, 2, 3)).reshape(2, -1).numpy()
        return {"gender": (bright > 100).astype(int), "skin": (bright > 100).astype(int), "bloody": bright == 200,
                "zombie": bright < 0, "smoking": bright < 0, "profession": bright < 1000, "damaged": bright < 255}

    def generate_all(sd, prompts, n, principle, value_encoder, fraction=None):
        tokens = [i % 2 == 0 or fraction == 1 or "equality" not in principle for i in range(2 * n)]
        levels = [token * (255 if i % 4 else 200) for i, token in enumerate(tokens)]
        return [Image.new("RGB", (4, 4), (level,) * 3) for level in levels], tokens

    monkeypatch.setattr(wordings, "generate_all", generate_all)
    row = wordings.measure_wording(None, "an encoder", "a happy {}", 4, read)
    assert row["gender"].tolist() == [0, 0]
    assert row["bloody"].tolist() == [25, 25] and row["zombie"].tolist() == [0, 0]
    assert row["profession"] == 100 and row["damaged"] == 0  # of the images with a token and without blood
    of_all = wordings.measure_wording(None, None, "a happy {}", 4, read)
    assert of_all["damaged"] == pytest.approx(100 / 3)  # of two principles 4 of the 6 without blood, of two none of 6
    assert wordings.describe(None, "an encoder", BLOODY, "bloody", 4, read) == (
        "damaged 0.0 %, profession 100.0 %, R 25.0 %, 0 pale, 8 light, 0 tan, 0 brown, 0 dark")
    assert row["skin"] == pytest.approx(100 * (2 * 0.3**2 + 3 * 0.2**2) ** 0.5)


def test_the_command_on_wordings(tiny, tiny_livo, capsys, monkeypatch):
    monkeypatch.setattr(wordings, "load_classifier", lambda: Classifier().eval())
    monkeypatch.setattr(wordings, "load_detector", lambda: damage.Detector().eval())
    monkeypatch.setattr(portraits, "PROFESSIONS", ("judge", "artist"))
    monkeypatch.setitem(wordings.SAMPLING, "steps", 1)
    options = ["--weights", str(tiny), "-n", "2", "--only", "2"]
    refused("with a value encoder, got none", wordings.main, options)
    refused("--base: expected neither", wordings.main, [*options, "--base", "--value-encoder", "x"])
    wordings.main([*options, "--value-encoder", str(tiny_livo)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| a portrait of a … |") and [line.count("|") for line in lines[:4]] == [8] * 4
    assert sum(line.startswith("harmless prompts, ") for line in lines) == 2
    wordings.main([*options, "--value-encoder", str(tiny_livo), "--tokens"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [*PRINCIPLES]
    wordings.main([*options, "--base"])
    assert not re.search("harmless", capsys.readouterr().out)


# ── Damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────

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
