"""`python -m lab.dataset`: build, check and show preference data."""

import json
import os
import re
import shutil
import warnings
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import sample
import train
from conftest import KILLS, REPOSITORY, StubClassifier, edit_json, refused, run_with_kills
from lab import dataset, portraits, toy
from lab import principles as table
from lab.captions import write_caption
from lab.check import SIDE, check
from lab.principles import STABLE_DIFFUSION_PRINCIPLES, TOY_PRINCIPLES, bias
from retrieve import BLOODY, GENDER, RACE, ZOMBIE, retrieve

SMOKING = "smoking considered inappropriate"


def test_the_readme_shows_the_code_of_a_principle():
    snippet = re.search(r"harm\(.*?\)\n", (REPOSITORY / "lab" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert eval(snippet[0], vars(table)) == TOY_PRINCIPLES[-1]


def classify_by_hash(principle, noun, images):
    return [[*principle.classes][zlib.crc32(image.tobytes()) % len(principle.classes)] for image in images]


def options(tiny, out, *more):
    return ["build", "--weights", str(tiny), "--out", str(out), "--steps", "1", "--device", "cpu", *map(str, more)]


def build(tiny, out, *more):
    """20 pairs: six scenes of a bias principle, six of a toxicity principle. Classes are chosen by a hash."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "open_classifier", lambda *_: ("stub", classify_by_hash, TOY_PRINCIPLES))
        dataset.main(options(tiny, out, "--principle", RACE, "--principle", SMOKING, "--total", 20,
                             "--batch-size", 8, *more))


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """A set that nothing interrupted."""
    out = tmp_path_factory.mktemp("built") / "set"
    build(tiny, out)
    return out


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ── Byte-identical builds ────────────────────────────────────────────────────────────────────────────────────────────

def test_three_shards_equal_one_process(tiny, built, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    build(tiny, out, "--shard", "2/3")
    refused("sound dataset", dataset.main, ["check", str(out)])
    assert "is not finished" in capsys.readouterr().out
    build(tiny, out, "--shard", "0/3")
    assert "shard 0 of 3 is done" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # as torchrun does
    monkeypatch.setenv("WORLD_SIZE", "3")
    build(tiny, out)
    assert tree(out) == tree(built)


def test_thirty_kills_at_random_moments_change_nothing(tiny, built, tmp_path):
    left = KILLS
    while left:
        out = tmp_path / str(left)
        left = run_with_kills(lambda out: build(tiny, out), lambda: out, left, seconds=0.8)
        assert tree(out) == tree(built)


def test_a_full_disk_leaves_no_half_written_scene(tiny, built, tmp_path, monkeypatch):
    out, write_scene = tmp_path / "set", toy.write_scene

    def full(folder, *args):
        write_scene(folder, *args)
        if len([*out.glob("*/[!.]*/scene.json")]) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(toy, "write_scene", full)
        refused("expected to write .*No space left", build, tiny, out)
    assert not [*out.rglob(".*")] and len([*out.glob("*/*/metadata.jsonl")]) == 2
    build(tiny, out)
    assert tree(out) == tree(built)


@pytest.mark.parametrize("facts", [{"tried": {}}, {"tried": {"a": 0}}, {"kept": {"a": 10**400}}, {"images": -1}])
def test_damaged_facts_about_a_scene(tiny, built, tmp_path, facts):
    out = shutil.copytree(built, tmp_path / "set")
    for file in out.glob("*/*/scene.json"):
        edit_json(file, **facts)
    refused("expected numbers as tried and kept", build, tiny, out)


def test_a_contact_sheet_shows_some_of_many_principles(built, monkeypatch):
    monkeypatch.setattr("lab.check.PRINCIPLES", 1)
    with pytest.warns(match="shows 1 of 2 principles"):
        dataset.contact_sheet(data.read_samples(built)[0])


# ── Labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_built_images_show_what_their_labels_say(built):
    about = json.loads((built / "dataset.json").read_text())
    assert {value: (sums["pairs"], sums["preservation"]) for value, sums in about["principles"].items()} == {
        RACE: (10, 0), SMOKING: (10, 10)}
    samples, faults = data.read_samples(built)
    assert not faults and not check(built)[1] and len(samples) == 2 * 20 + 10
    assert {(one.value, one.scene.parent.name) for one in samples} == {
        (RACE, "0-career"), (SMOKING, "toxicity"), (SMOKING, "preservation")}
    principles = {principle.value: principle for principle in TOY_PRINCIPLES}
    for one in samples:
        facts = about["scenes"][one.scene.relative_to(built).as_posix()]
        predicted, = classify_by_hash(principles[one.value], "", [Image.open(one.path)])
        assert one.aligned == (predicted != facts["violating"])
        generated = json.loads((one.scene / "scene.json").read_text())["files"][int(one.path.stem)]["prompt"]
        if one.value == RACE:  # the class is in the prompt that is generated, not in the stored one
            assert "skin" in generated and "skin" not in one.prompt
        else:
            assert ("smok" in generated) == (not one.aligned)
        if data.is_preservation(one):
            assert one.aligned and facts["tried"].keys() == {"no smoking"} and "smok" not in one.prompt
    for facts in about["scenes"].values():
        majority = max(portraits.SKINS, key=lambda skin: facts["plain"].get(skin, 0))
        assert facts["violating"] == (majority if facts["plain"] else "smoking")
        assert sum(facts["plain"].values()) in (0, dataset.PLAIN_IMAGES)
    tried = sum(sum(facts["tried"].values()) for facts in about["scenes"].values())
    assert tried == sum(sums["tried"] for sums in about["principles"].values()) > 60  # a half, a fifth are accepted
    for name, rows in ("racial-equality", 6), ("smoking-considered-inappropriate", 5):  # preservation scenes have one
        assert Image.open(built / f"{name}.png").height == rows * (SIDE + 16)


AGE = bias("age equality", "age", {"t": ("judge",)}, {age: (age + " {}",) for age in ("young", "grey", "old")})


def fake_scene(pairs, majority, accepts=lambda name, k: True):
    """build_scene of "images" that are their prompts; accepts(name, k): does the k-th of a class show it?"""
    seen = Counter()

    def predict(image):
        asked = next((name for name in AGE.classes if name in image), majority)
        seen[asked] += 1
        return asked if asked == majority or accepts(asked, seen[asked]) else "nothing"

    return dataset.build_scene(dataset.Scene(AGE, "t/s", "judge", pairs), lambda prompts, seeds: prompts,
                               lambda principle, noun, images: [*map(predict, images)], 0, 8)


@pytest.mark.parametrize("majority", AGE.classes)
def test_the_majority_class_violates_and_the_others_are_aligned_equally_often(majority):
    samples, facts = fake_scene(11, majority)
    assert facts["violating"] == majority and facts["plain"] == {majority: dataset.PLAIN_IMAGES}
    counts = Counter((name, label) for file, (*_, label) in zip(facts["files"], samples, strict=True)
                     for name in AGE.classes if name in file["prompt"])
    a, b = (name for name in AGE.classes if name != majority)
    assert facts["images"] == 22 and counts[majority, 0] == 11 and {counts[a, 1], counts[b, 1]} == {5, 6}
    assert {prompt for _, prompt, _, _ in samples} == {opening + "a judge" for opening in AGE.openings}


def test_classes_that_the_model_does_not_show_are_given_up():
    with pytest.warns(match=r"t/s: 0 of \d\d images show “grey”, less than 5%"):
        _, facts = fake_scene(10, "old", lambda name, k: name != "grey")
    assert facts["images"] == 20 and facts["kept"] == {"young": 10, "grey": 0, "old": 10}  # the others take its place
    with pytest.warns(match="“(young|grey)”"):
        assert not fake_scene(10, "old", lambda name, k: False)[0]
    with warnings.catch_warnings(action="error"):
        _, facts = fake_scene(10, "old", lambda name, k: k % 10 == 0)  # one of ten is enough
        assert facts["images"] == 20 and facts["tried"]["grey"] == 50
        # so is less, if no more are wanted: the third is the 61st
        _, facts = fake_scene(6, "old", lambda name, k: name != "grey" or k in (1, 2, 61))
        assert facts["kept"] == {"young": 3, "grey": 3, "old": 6} and facts["tried"]["grey"] >= 61


def test_a_set_is_finished_although_scenes_are_given_up(tiny, tmp_path, monkeypatch):
    def classify(principle, noun, images):
        return classify_by_hash(principle, noun, images) if noun == "chef" else [None] * len(images)

    monkeypatch.setattr(dataset, "PATIENCE", 8)
    monkeypatch.setattr(dataset, "open_classifier", lambda *_: ("stub", classify, TOY_PRINCIPLES))
    with pytest.warns(match="given up"):
        dataset.main(options(tiny, tmp_path / "set", "--principle", SMOKING, "--per-prompt", 2))
    sums = json.loads((tmp_path / "set" / "dataset.json").read_text())["principles"][SMOKING]
    assert (sums["pairs"], sums["preservation"], sums["scenes"], sums["given_up"]) == (2, 1, 2 * 13, 2 * 12)
    assert not check(tmp_path / "set")[1]
    with pytest.warns(match="given up"):
        none = options(tiny, tmp_path / "none", "--principle", SMOKING, "--total", 1)
        refused("got none: smoking", dataset.main, none)


# ── Principles and classifiers ───────────────────────────────────────────────────────────────────────────────────────

def test_the_toy_classifiers_predictions_become_classes(tiny, tmp_path, monkeypatch):
    images = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in (1, 0)]
    classes = {p.value: dataset.classify_toy(StubClassifier(), p, "", images) for p in TOY_PRINCIPLES}
    assert classes[GENDER] == ["man", "woman"] and classes[RACE] == ["light", "pale"]
    assert classes[SMOKING] == ["smoking", "no smoking"] and classes[ZOMBIE] == ["zombie", "no zombie"]
    monkeypatch.setattr(dataset, "TOY_PRINCIPLES", (AGE,))
    monkeypatch.setattr(dataset, "load_classifier", StubClassifier)
    refused("--classifier toy: expected an attribute that it knows, of profession, .*, got age", dataset.main,
            options(tiny, tmp_path / "set"))


def test_clip_classifies_images_of_other_models(tiny, tmp_path, monkeypatch):
    """With a CLIP the concepts are those for Stable Diffusion; texts are "prompt, class", as the authors' are."""
    other, asked = shutil.copytree(tiny, tmp_path / "model"), set()
    edit_json(other / "unet" / "config.json", sample_size=8)

    def zero_shot(clip, images, texts):
        assert clip == "clip of some/clip" and all(image.size == (32, 32) for image in images)
        asked.add(tuple(texts))
        return torch.tensor([[image.getpixel((0, 0))[0] % 2, 0.5] for image in images])

    monkeypatch.setattr("lab.clip_image.zero_shot", zero_shot)
    monkeypatch.setattr("lab.clip_image.load_clip", lambda source, device: f"clip of {source}")
    (tmp_path / "mine.txt").write_text("\ufeffA plumber\n\ndoctor\n", encoding="utf-8")
    words = options(other, tmp_path / "set", "--principle", GENDER, "--principle", ZOMBIE, "--total", 40,
                    "--format", "jpg")
    refused("expected a CLIP for images of 32 pixels.*got none", dataset.main, words)
    dataset.main([*words, "--classifier", "some/clip", "--prompts", str(tmp_path / "mine.txt")])
    assert asked >= {("a photo of the face of a plumber, female", "a photo of the face of a plumber, male"),
                     ("a photo of a bride", "a photo of a bride, zombie")}
    samples, _ = data.read_samples(tmp_path / "set")
    assert {(s.value, s.scene.parent.name) for s in samples} == {
        *((GENDER, type) for type in ("0-career", "1-goodness", "2-badness", "own")), (ZOMBIE, "toxicity"),
        (ZOMBIE, "preservation")}
    assert [s.scene.name for s in samples if "doctor" in s.scene.name and s.value == GENDER] == ["gender-doctor"] * 2
    assert all(Image.open(s.path).format == "JPEG" for s in samples)


def test_prompts_use_the_words_that_the_models_know():
    """tiny-sd knows every word of the toy prompts, each class has wordings of its own, the retriever sees toxicity."""
    captions = " ".join(write_caption(portraits.sample_record(seed)) for seed in range(3000))
    known = set(re.split(r"[ -]", captions))
    for scene in dataset.plan(TOY_PRINCIPLES, 1):
        prompts = {name: {dataset.compose(scene, name, k, 0)[0] for k in range(40)} for name in scene.principle.classes}
        assert {word for some in prompts.values() for prompt in some for word in re.split(r"[ -]", prompt)} <= known
        assert not set.intersection(*prompts.values())
        if (p := scene.principle.violating) and not scene.preservation:
            stored = [dataset.compose(scene, name, k, 0)[1] for name in prompts for k in range(100)]
            assert all(any(word in prompt for word in (p, "blood", "smok")) for prompt in stored)
    for scene in dataset.plan(STABLE_DIFFUSION_PRINCIPLES, 1):
        assert all(retrieve(dataset.compose(scene, scene.principle.violating, k, 0)[0]) for k in range(5)), scene.folder


def test_the_total_is_spread_evenly():
    for total, sizes in ((None, {(50, False): 65, (25, True): 39}),
                         (2000, {(30, False): 15, (31, False): 50, (15, True): 9, (16, True): 30})):
        scenes = dataset.plan(TOY_PRINCIPLES, 50, total)
        assert Counter((scene.size, scene.preservation) for scene in scenes) == sizes


@pytest.mark.parametrize("change, message", [
    (["--total", "21"], 'got one with pairs {"total": 20}, not {"total": 21}'), (["--seed", "1"], "seed 0, not 1"),
    (["--out", "{other}"], "without a dataset.json"), (["--prompts", "{other}/long"], "concepts of 1 to 60 letters")])
def test_other_options_are_refused_and_change_nothing(tiny, built, tmp_path, change, message):
    (tmp_path / "long").write_text("a very " + "very " * 20 + "old person")
    before = tree(built)
    refused(re.escape(message), build, tiny, built, *(word.format(other=tmp_path) for word in change))
    assert tree(built) == before and [path.name for path in tmp_path.iterdir()] == ["long"]


def test_a_built_set_trains_a_value_encoder_for_a_new_principle(tiny, built, tmp_path):
    train.main(f"--weights {tiny} --data {built} --steps 3 --batch 2 --micro-batch 2 --sample-every 1000 "
               f"--out {tmp_path / 'run'} --device cpu".split())
    sample.main([*f"--weights {tiny} --value-encoder {tmp_path / 'run'} --steps 2 -n 2 --out {tmp_path}".split(),
                 "--prompt", "a portrait of a smoking judge", "--principle", SMOKING])
    assert Image.open(tmp_path / "0001.png").text["principle"] == SMOKING


# ── check, show ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def release(tmp_path):
    """Written by hand as the authors released theirs: JPEG files of any size, several violating ones a scene."""
    for scene, value, n in (("0-career/doctor", GENDER, 3), ("0-career/CEO", RACE, 2), ("1-goodness/kind", GENDER, 2),
                            ("2-badness/lazy", RACE, 2), ("3-toxic/street", BLOODY, 3)):
        for i in range(2 * n):
            add_image(tmp_path / "livo_data", scene, f"{Path(scene).name}_{i}.jpg", value, int(i < n))
    return tmp_path / "livo_data"


def add_image(root, scene="0-career/doctor", name="new.jpg", value=GENDER, label=1):
    """-> the path of a new image."""
    (root / scene).mkdir(parents=True, exist_ok=True)
    Image.effect_noise((40 + 8 * len([*root.glob("*/*/*.jpg")]), 64), 50).convert("RGB").save(root / scene / name)
    with open(root / scene / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": name, "prompt": "a doctor", "value": value, "label": label}) + "\n")
    return root / scene / name


def test_the_authors_layout_is_read_checked_and_shown(release, sd, tmp_path, capsys):
    assert len(data.PreferenceDataset(release, sd, tmp_path / "cache")) == 12
    dataset.main(["check", str(release)])
    rows = [re.split("  +", row) for row in capsys.readouterr().out.splitlines()]
    assert [GENDER, "5", "5", "0", "2", "1", "42%"] in rows and [BLOODY, "3", "3", "0", "1", "1", "25%"] in rows
    dataset.main(["show", str(release), "--out", str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").height == 5 * 2 * (SIDE + 16)


def test_check_finds_what_training_would_accept(release, capsys):
    """What it would skip is in lab/test_core.py."""
    os.truncate(add_image(release), 700)
    add_image(release, name="two.jpg", label=2)
    add_image(release, name="../doctor/up.jpg")
    shutil.copy(release / "0-career/doctor/doctor_0.jpg", add_image(release, name="same.jpg", label=0))
    add_image(release, "0-career/x", label=0)
    add_image(release, name="slip.jpg", value="Gender equality\x1b[2J", label=0)
    refused("got 6 faults", dataset.main, ["check", str(release)])
    output = capsys.readouterr().out
    assert "\x1b" not in output
    for fault in ("doctor: expected one principle, got 'Gender equality",
                  "doctor/metadata.jsonl:7: new.jpg is no readable image", ":8: expected 0 or 1 as label, got 2",
                  ":9: expected a file of the scene, got ../doctor/up.jpg", ":10: same.jpg is the same image as",
                  "x: expected aligned and violating images, got only violating ones"):
        assert fault in output


def test_check_names_lost_scenes(built, tmp_path):
    lost = shutil.copytree(built, tmp_path / "lost")
    shutil.rmtree(scene := min(lost.glob("*/*/scene.json")).parent)
    assert check(lost)[1] == [f"{scene}: expected 2 images, got no metadata.jsonl"]
