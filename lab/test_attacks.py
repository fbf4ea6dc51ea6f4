"""Rewrites, attacks, gates and combinations of principles."""

import json
from types import SimpleNamespace

import numpy as np
import torch

from conftest import pixels, refused, trained_a_little
from lab import attacks, comparison, gate, portraits, rewrites
from lab.classifier import Classifier, uniform_record
from retrieve import BLOODY, GENDER, RACE, ZOMBIE, retrieve
from sample import generate


def test_rewrites_depend_on_the_seed_alone_and_keep_the_subject():
    for kind in rewrites.REWRITES:
        first, again, other = (rewrites.rewrites(kind, "zombie", ["judge"], 8, seed)[0] for seed in (0, 0, 1))
        assert first == again and all("judge" in prompt for prompt in first)
        assert first == other if kind == "as it is" else len({*first, *other}) > 2


def test_an_attack_succeeds_by_the_image_and_the_search_climbs():
    known, plain = "a portrait of a bloody judge".split(), lambda prompts, seeds: prompts
    unknown = SimpleNamespace(classify=lambda prompts: {"bloody": torch.tensor([  # prompts instead of images
        np.mean([word not in known for word in prompt.split()]) for prompt in prompts])})
    prompts = [["bloody judge", "x y z"], ["x judge y", "a portrait"]]
    assert attacks.attack(plain, prompts, "bloody", unknown).tolist() == [[False, True], [True, False]]
    assert attacks.search(plain, "bloody judge", "bloody", ["zz"], unknown, 0)  # needs both words, one a round
    assert not attacks.search(lambda prompts, seeds: ["a"] * len(prompts), "x judge", "bloody", ["zz"], unknown, 0)


def test_bias_principles_are_in_half_of_the_images_and_toxic_ones_go_alone():
    assert attacks.active([BLOODY, GENDER], 2) == [(BLOODY, GENDER), (BLOODY,)]
    functions = attacks.methods(list, "bloody", {"retriever": retrieve, "blind": lambda prompt: []},
                                 {"UCE": lambda prompt, seeds: [(prompt, seed) for seed in seeds]})
    rows = {name: function(["a bloody tree"], [3])[0] for name, function in functions.items()}
    assert rows["LiVO, retriever"] == rows["LiVO, principle given"] == ("a bloody tree", 3, (BLOODY,), "")
    assert rows["LiVO, blind"] == rows["base model"] == ("a bloody tree", 3, (), "")
    assert rows["UCE"] == (comparison.Prompt("a bloody tree", None, (BLOODY,)), 3)
    assert BLOODY in rows["principle in the prompt"][0] and "blood" in rows["negative prompt"][3]
    judges = functions["LiVO, retriever"](["a judge"] * 4, range(4))
    assert [principles for _, _, principles, _ in judges] == [(GENDER, RACE), (RACE,), (GENDER,), ()]


def test_images_are_those_of_sample_py_and_made_once(sd):
    images = attacks.Images(sd, value_encoder := trained_a_little(sd))
    rows = [("a judge", 5, (), ""), ("a nurse", 6, (BLOODY, ZOMBIE), ""), ("a judge", 5, (), "man")]
    ours = images(rows)
    for image, (prompt, seed, principles, negative) in zip(ours, rows):
        (_, reference, _), = generate(sd, prompt, negative, principles, value_encoder, [seed], **attacks.SAMPLING)
        assert abs(pixels([image]) - pixels([reference])).max() <= 1
    assert images(rows[1:])[0] is ours[1] and (pixels(ours[:1]) != pixels(ours[2:])).any()


def test_gate_separates_and_its_table_counts():
    clip = SimpleNamespace(text_features=lambda texts: torch.tensor([[float("blood" in t), 1.0] for t in texts]))
    table = gate.gate_table(clip, {"blind": lambda prompt: []}, {"all": ["bloody", "b"]}, {"other": ["blood", "c"]})
    assert table["blind"] == {"let through, all": 100, "refused, captions": 0, "refused, captions with an absence": 0,
                              "refused, other": 0}
    assert gate.train_gate(clip, ["bloody", "judge"], [True, False])(["blood", "c"]) == [True, False]


def test_the_command(tiny, tiny_livo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attacks, "load_classifier", lambda: Classifier().eval())
    monkeypatch.setattr(attacks, "SUBJECTS", ("judge", "artist"))
    monkeypatch.setattr(gate, "GATE_CAPTIONS", 50)
    monkeypatch.setitem(attacks.SAMPLING, "steps", 1)
    monkeypatch.setattr(attacks.baselines, "finished", lambda folder, sd: {
        "LiVO": None, "UCE": lambda prompt, seeds: [portraits.render(uniform_record(seed)) for seed in seeds]})
    (tmp_path / "before.py").write_text("retrieve = lambda prompt: []")
    options = ["--weights", str(tiny), "-n", "2", "--out", str(tmp_path / "attacks.json")]
    refused("with a value encoder, got none", attacks.main, options)
    refused("expected a function retrieve", attacks.main, ["--before", rewrites.__file__, *options])
    attacks.main([*options, "--value-encoder", str(tiny_livo), "--before", str(tmp_path / "before.py"),
                  "--baselines", "runs"])
    results = json.loads((tmp_path / "attacks.json").read_text())
    row = results["attacks, % success"]["as it is"]
    assert row["retriever before"] == 100 and "UCE" in row and "LiVO" not in row
    assert len(results["principles together, %"]) == 12 and "| two sentences |" in capsys.readouterr().out
