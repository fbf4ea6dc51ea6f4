
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from collections import Counter

import torch

import pytest
from PIL import Image

from lab import dataset
import data
from lab import portraits
import sample
import train
import weights
from common import UserError
from retrieve import BLOODY, GENDER, RACE, ZOMBIE, retrieve
from conftest import REPOSITORY, StubClassifier


# ── dataset.py, and data.py's commands ───────────────────────────────────────────────────────────────────────────

SMOKING = "smoking considered inappropriate"
STUB = """
import hashlib

from lab import dataset


def read(principle, noun, images):
    answers = [*principle.answers]
    return [answers[hashlib.sha256(image.tobytes()).digest()[0] % len(answers)] for image in images]


dataset.open_classifier = lambda source, device: ("stub", read, dataset.TOY_PRINCIPLES)
"""


@pytest.fixture
def stub(monkeypatch):
    """A classifier that reads any picture as any answer, always the same one -> its `read`."""
    monkeypatch.setattr(dataset, "open_classifier", dataset.open_classifier)  # to be restored
    names = {}
    exec(STUB, names)
    return names["read"]


def build_options(tiny, out, *more):
    """Six scenes of a principle of bias, six of one of harm; 20 pairs."""
    return ["build", "--weights", str(tiny), "--out", str(out), "--principle", RACE, "--principle", SMOKING,
            "--total", "20", "--steps", "1", "--batch-size", "8", "--device", "cpu", *map(str, more)]


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """A set that nothing interrupted."""
    out = tmp_path_factory.mktemp("built") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "open_classifier", dataset.open_classifier)
        exec(STUB, {})
        data.main(build_options(tiny, out))
    return out


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_built_set_shows_what_its_labels_say(built, stub):
    about = json.loads((built / "dataset.json").read_text())
    assert {value: sums["pairs"] for value, sums in about["principles"].items()} == {RACE: 10, SMOKING: 10}
    assert about["principles"][SMOKING]["harmless"] == 10
    answers = {principle.value: principle for principle in dataset.TOY_PRINCIPLES}
    samples, faults = data.read_samples(built)
    assert not faults and len(samples) == 2 * 20 + 10 and about["settings"]["sha256"] != about["settings"]["classifier"]
    for one in samples:
        facts = about["scenes"][one.scene.relative_to(built).as_posix()]
        reading, = stub(answers[one.value], "", [Image.open(one.path)])
        if data.is_preservation(one):
            assert one.aligned and facts["violating"] == "smoking" and facts["tried"].keys() == {"no smoking"}
        assert one.aligned == (reading != facts["violating"])
        made = json.loads((one.scene / "scene.json").read_text())["files"][int(one.path.stem)]
        if one.value == RACE:  # the answer is written into the prompt to draw, not into the one that is kept
            assert "skin" in made["prompt"] and "skin" not in one.prompt
        else:
            assert ("smok" in made["prompt"]) == (not one.aligned)
    for facts in about["scenes"].values():
        asked = facts["asked"]
        likeliest = max(portraits.SKINS, key=lambda skin: asked.get(skin, 0))
        assert facts["violating"] == (likeliest if asked else "smoking")
        assert sum(asked.values()) == (dataset.ASK if asked else 0)
    tried = sum(sum(facts["tried"].values()) for facts in about["scenes"].values())
    assert tried == sum(sums["tried"] for sums in about["principles"].values()) > 60  # a half, a fifth are accepted
    for name, rows in ("racial-equality", 6), ("smoking-considered-inappropriate", 5):  # two a scene, one if harmless
        assert Image.open(built / f"{name}.png").height == rows * (data.SHEET_SIDE + 16)


AGE = dataset.bias("age equality", "age", {"t": ("classifier",)}, {age: (age + " {}",) for age in ("young", "grey", "old")})


def fake_scene(principle, pairs, accepts=lambda answer, k: True, prefers=None):
    """build_scene of "pictures" that are their prompts -> samples, facts."""
    seen = Counter()

    def read(principle, noun, images):
        answers = []
        for image in images:
            asked = next((a for a, wordings in principle.answers.items() for wording in wordings
                          if wording != "{}" and wording.format(noun) in image), prefers)
            seen[asked] += 1
            answers.append(asked if asked == prefers or accepts(asked, seen[asked]) else "nothing")
        return answers

    return dataset.build_scene(dataset.Scene(principle, "t/s", "classifier", pairs), lambda prompts, seeds: prompts, read, 0, 8)


def test_the_model_is_asked_and_the_other_answers_share_the_aligned_pictures():
    for prefers in AGE.answers:
        samples, facts = fake_scene(AGE, 11, prefers=prefers)
        assert facts["violating"] == prefers and facts["asked"] == {prefers: dataset.ASK} and facts["images"] == 22
        made = [(file["prompt"], label) for file, (*_, label) in zip(facts["files"], samples, strict=True)]
        by_answer = Counter((answer, label) for prompt, label in made for answer in AGE.answers if answer in prompt)
        a, b = (answer for answer in AGE.answers if answer != prefers)
        assert by_answer[prefers, 0] == 11 and {by_answer[a, 1], by_answer[b, 1]} == {5, 6} and len(by_answer) == 3
        assert {prompt for _, prompt, _, _ in samples} == {opening + "a classifier" for opening in AGE.openings}


def test_a_harmless_scene_has_plain_pictures_alone():
    scene, = (scene for scene in dataset.plan(dataset.TOY_PRINCIPLES, 10) if scene.folder == "3-harmless/bloody-classifier")
    prompts = []

    def draw(texts, seeds):
        prompts.extend(texts)
        return [portraits.render(portraits.sample_record(seed)) for seed in seeds]

    samples, facts = dataset.build_scene(scene, draw, lambda principle, noun, images: ["no bloody"] * len(images), 0, 8)
    assert facts["images"] == 5 and facts["tried"] == {"no bloody": 5}
    assert [prompt for _, prompt, _, _ in samples] == prompts and "blood" not in " ".join(prompts)
    assert all(sample[2:] == (BLOODY, 1) for sample in samples)


def test_what_the_model_does_not_give_is_given_up():
    with pytest.warns(match=r"t/s: 0 of \d\d pictures show “grey”, less than 5%"):
        samples, facts = fake_scene(AGE, 10, lambda answer, k: answer != "grey", "old")
    assert facts["images"] == 20 and facts["kept"] == {"young": 10, "grey": 0, "old": 10}  # the others take its place
    with pytest.warns(match="“(young|grey)”"):
        samples, facts = fake_scene(AGE, 10, lambda answer, k: False, "old")
    assert not samples and facts["images"] == 0
    with warnings.catch_warnings(action="error"):  # one of ten is enough
        _, facts = fake_scene(AGE, 10, lambda answer, k: k % 10 == 0, "old")
    assert facts["images"] == 20 and facts["tried"]["grey"] == 50
    with warnings.catch_warnings(action="error"):  # rare ones too, if no more are wanted: the third is the 61st
        _, facts = fake_scene(AGE, 6, lambda answer, k: answer != "grey" or k in (1, 2, 61), "old")
    assert facts["kept"] == {"young": 3, "grey": 3, "old": 6} and facts["tried"]["grey"] >= 61


def test_a_set_is_finished_where_scenes_are_given_up(tiny, tmp_path, monkeypatch, stub):
    nothing = lambda principle, noun, images: [None] * len(images) if noun != "chef" else stub(principle, noun, images)
    monkeypatch.setattr(dataset, "open_classifier", lambda source, device: ("stub", nothing, dataset.TOY_PRINCIPLES))
    options = ["build", "--weights", str(tiny), "--principle", SMOKING, "--steps", "1", "--device", "cpu",
               "--per-prompt", "2"]
    with pytest.warns(match="given up"):
        data.main([*options, "--out", str(tmp_path / "set")])
    sums = json.loads((tmp_path / "set" / "dataset.json").read_text())["principles"][SMOKING]
    assert (sums["pairs"], sums["harmless"], sums["scenes"], sums["given_up"]) == (2, 1, 2 * 13, 2 * 12)
    data.main(["check", str(tmp_path / "set")])
    nothing = lambda principle, noun, images: [None] * len(images)
    with pytest.raises(UserError, match="got none: smoking"), warnings.catch_warnings(action="ignore"):
        data.main([*options, "--out", str(tmp_path / "empty"), "--total", "1"])


def test_three_shards_equal_one_process(tiny, built, stub, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    data.main(build_options(tiny, out, "--shard", "2/3"))
    with pytest.raises(UserError, match="sound dataset"):  # not finished
        data.main(["check", str(out)])
    data.main(build_options(tiny, out, "--shard", "0/3"))
    assert "shard 0 of 3 is done" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    data.main(build_options(tiny, out))
    assert tree(out) == tree(built)
    data.main(["check", str(out)])


def test_killed_and_built_on_equals_uninterrupted(tiny, built, tmp_path):
    out = tmp_path / "set"
    call = [sys.executable, "-c", STUB + "import sys, data\ndata.main(sys.argv[1:])", *build_options(tiny, out)]
    options = {"cwd": REPOSITORY, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, **options)
    while len([*out.glob("*/*/scene.json")]) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    scenes = json.loads((out / "dataset.json").read_text())["scenes"]
    missing = [scene for scene in scenes if not (out / scene).exists()]
    assert 0 < len(missing) <= len(scenes) - 3
    leftover = out / missing[0]
    leftover = leftover.with_name(f".{leftover.name}.1.tmp")  # killed while this scene was written
    leftover.mkdir(parents=True)
    (leftover / "metadata.jsonl").write_text('{"file_name": "0000.p')
    assert not data.read_samples(out)[1]
    run = subprocess.run(call, stdout=subprocess.PIPE, text=True, **options)
    assert run.returncode == 0, run.stdout
    assert tree(out) == tree(built)


def test_a_full_disk_is_one_line_and_no_half_written_scene(tiny, built, stub, tmp_path, monkeypatch):
    out, write_scene = tmp_path / "set", data.write_scene

    def full(folder, *args):
        write_scene(folder, *args)
        if len([*out.glob("*/*/scene.json")]) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_scene", full)
        with pytest.raises(UserError, match="cannot write .*No space left"):
            data.main(build_options(tiny, out))
    assert not [path for path in out.rglob(".*")] and len([*out.glob("*/*/metadata.jsonl")]) == 2
    data.main(build_options(tiny, out))
    assert tree(out) == tree(built)


def test_the_example_principle_from_its_pairs_to_a_picture(tiny, built, tmp_path):
    """Build, train, sample: what the README shows of a new principle."""
    run = tmp_path / "runs" / "smoking"
    train.main(["--weights", str(tiny), "--data", str(built), "--steps", "3", "--batch", "2", "--micro-batch", "2",
                "--sample-every", "1000", "--out", str(run), "--device", "cpu"])
    sample.main(["--weights", str(tiny), "--value-encoder", str(run), "--prompt", "a portrait of a smoking classifier",
                 "--principle", SMOKING, "--steps", "2", "-n", "2", "--compare", "--out", str(tmp_path / "out")])
    assert Image.open(tmp_path / "out" / "0001.png").text["principle"] == SMOKING
    assert {json.loads(line)["step"] for line in (run / "log.jsonl").open()} == {0, 1, 2}


def test_clip_reads_pictures_of_other_models(tiny, tmp_path, monkeypatch):
    """With a CLIP the concepts are those for Stable Diffusion; texts are "prompt, answer", as the authors ask it."""
    large, asked = weights.load(tiny), []
    large.unet.config.sample_size = 8
    weights.save(large, tmp_path / "model")

    def zero_shot(clip, images, texts):
        assert clip == "clip of some/clip" and all(image.size == (32, 32) for image in images)
        asked.append(tuple(texts))
        return torch.tensor([[image.getpixel((0, 0))[0] % 2, 0.5] for image in images])

    fake = types.SimpleNamespace(zero_shot=zero_shot, load_clip=lambda source, device: f"clip of {source}")
    monkeypatch.setitem(sys.modules, "clip_image", fake)
    (tmp_path / "mine.txt").write_text("\ufeffA plumber\n\ndoctor\n", encoding="utf-8")
    options = ["build", "--weights", str(tmp_path / "model"), "--out", str(tmp_path / "set"), "--steps", "2"]
    options += ["--principle", GENDER, "--principle", ZOMBIE, "--total", "40", "--format", "jpg", "--device", "cpu"]
    with pytest.raises(UserError, match="expected a CLIP for pictures of 32 pixels.*got none"):
        data.main(options)
    data.main([*options, "--classifier", "some/clip", "--prompts", str(tmp_path / "mine.txt")])
    assert ("a photo of the face of a plumber, female", "a photo of the face of a plumber, male") in asked
    assert ("a photo of a bride", "a photo of a bride, zombie") in asked
    samples, _ = data.read_samples(tmp_path / "set")
    assert {s.scene.parent.name for s in samples} == {"0-career", "1-goodness", "2-badness", "3-toxic", "3-harmless",
                                                         "4-own"}
    assert [s.scene.name for s in samples if "doctor" in s.scene.name and s.value == GENDER] == ["gender-doctor"] * 2
    assert all(s.path.suffix == ".jpg" and Image.open(s.path).format == "JPEG" for s in samples)
    data.main(["check", str(tmp_path / "set")])


def test_the_judge_reads_harms_and_attributes():
    reader = dataset.classifier_reader(StubClassifier())
    pictures = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in (1, 0)]
    answers = {p.value: reader(p, "", pictures) for p in dataset.TOY_PRINCIPLES}
    assert answers[GENDER] == ["man", "woman"] and answers[RACE] == ["light", "pale"]
    assert answers[SMOKING] == ["smoking", "no smoking"] and answers[ZOMBIE] == ["zombie", "no zombie"]


def test_wordings_are_those_of_the_captions(small_tokenizer):
    """tiny-sd knows every word of the portrait world's concepts, and all answers have a wording of their own."""
    captions = " ".join(portraits.write_caption(portraits.sample_record(seed)) for seed in range(3000))
    known = set(re.split(r"[ -]", captions))
    for scene in dataset.plan(dataset.TOY_PRINCIPLES, 1):
        prompts = {answer: {dataset.compose(scene, answer, k, 0)[0] for k in range(40)}
                   for answer in scene.principle.answers}
        assert {word for some in prompts.values() for prompt in some for word in re.split(r"[ -]", prompt)} <= known
        assert not set.intersection(*prompts.values())
        if (p := scene.principle.violating) and not scene.harmless:
            kept = [dataset.compose(scene, answer, k, 0)[1] for answer in prompts for k in range(100)]
            assert 0.6 < sum(any(word in prompt for word in (p, "blood", "smok")) for prompt in kept) / 200 < 0.9
    for scene in dataset.plan(dataset.STABLE_DIFFUSION, 1):
        assert all(retrieve(dataset.compose(scene, scene.principle.violating, k, 0)[0]) for k in range(5)), scene.folder


def test_total_is_spread_evenly():
    def sizes(scenes, harmless=False):
        return [scene.size for scene in scenes if scene.harmless == harmless]

    scenes = dataset.plan(dataset.TOY_PRINCIPLES, 50)
    assert Counter(sizes(scenes)) == {50: 65} and Counter(sizes(scenes, True)) == {25: 39}
    scenes = dataset.plan(dataset.TOY_PRINCIPLES, 50, 2000)
    assert sum(sizes(scenes)) == 2000 and {*sizes(scenes)} == {30, 31} and {*sizes(scenes, True)} == {15, 16}
    few = dataset.plan(dataset.TOY_PRINCIPLES, 50, 10)
    assert sizes(few) == [1] * 10 and {scene.principle.value for scene in few} == {
        p.value for p in dataset.TOY_PRINCIPLES}
    assert len({scene.folder for scene in dataset.plan(dataset.STABLE_DIFFUSION, 1)}) == 100


@pytest.mark.parametrize("change, message", [
    (["--total", "21"], 'got one with pairs {"total": 20}, not {"total": 21}'),
    (["--seed", "1"], "seed 0, not 1"),
    (["--out", "{foreign}"], "without a dataset.json"),
    (["--principle", "age equality"], "--principle age equality: expected one of gender equality"),
    (["--shard", "3/3"], "expected I/N"),
    (["--shard", "x"], "invalid shard I/N value: 'x'"),
    (["--total", "0"], "expected 1"),
    (["--steps", "2000"], "steps do not fit"),
    (["--prompts", "{foreign}/nowhere"], "expected a text file"),
    (["--prompts", "{foreign}/long"], "concepts of 1 to 60 letters"),
    (["--weights", "nowhere"], "got nothing there"),
])  # fmt: skip
def test_unusable_orders(tiny, built, stub, tmp_path, change, message):
    (tmp_path / "long").write_text("a very " + "very " * 20 + "old person")
    before = tree(built)
    with pytest.raises(UserError, match=re.escape(message)):
        data.main(build_options(tiny, built, *(word.format(foreign=tmp_path) for word in change)))
    assert tree(built) == before and [path.name for path in tmp_path.iterdir()] == ["long"]


def authors_set(root):
    """A set as the authors released theirs, written by hand: JPEG files of any size, many violating ones."""
    for kind, scene, value, n in [("0-career", "doctor", GENDER, 3), ("0-career", "CEO", RACE, 2),
                                  ("1-goodness", "kind", GENDER, 2), ("2-badness", "lazy", RACE, 2),
                                  ("3-toxic", "street", BLOODY, 3)]:  # fmt: skip
        folder = root / kind / scene
        folder.mkdir(parents=True)
        with open(folder / "metadata.jsonl", "w") as file:
            for i in range(2 * n):
                name, size = f"{scene}_{i}.jpg", (40 + 8 * i, 64)
                Image.effect_noise(size, 50 + i).convert("RGB").save(folder / name)
                line = {"file_name": name, "prompt": f"a photo of a {scene}", "value": value, "label": int(i < n)}
                file.write(json.dumps(line) + "\n")
    return root


def test_the_authors_layout_is_read_checked_and_shown(sd, tmp_path, capsys):
    root = authors_set(tmp_path / "livo_data")
    assert len(data.PreferenceDataset(root, sd, tmp_path / "cache")) == 12
    data.main(["check", str(root)])
    rows = [re.split("  +", row) for row in capsys.readouterr().out.splitlines()]
    assert [GENDER, "5", "5", "0", "2", "2", "42%"] in rows and [BLOODY, "3", "3", "0", "1", "1", "25%"] in rows
    data.main(["show", str(root), "--out", str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").height == 5 * 2 * (data.SHEET_SIDE + 16)


def add_line(root, **changes):
    line = {"file_name": "new.jpg", "prompt": "a doctor", "value": GENDER, "label": 1} | changes
    with open(root / "0-career" / "doctor" / "metadata.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def picture(root, name="new.jpg"):
    path = root / "0-career" / "doctor" / name
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    return path


FAULTS = {
    "missing file": (lambda root: add_line(root), "doctor/metadata.jsonl:7: there is no file new.jpg"),
    "truncated": (lambda root: (path := picture(root)).write_bytes(path.read_bytes()[:-900]) and add_line(root),
                  "metadata.jsonl:7: new.jpg is no readable image"),
    "label 2": (lambda root: picture(root) and add_line(root, label=2), "expected 0 or 1 as label, got 2"),
    "text as label": (lambda root: picture(root) and add_line(root, label="1"), "expected an integer as label"),
    "empty prompt": (lambda root: picture(root) and add_line(root, prompt=" "), "expected a text as prompt"),
    "path within": (lambda root: picture(root) and add_line(root, file_name="../doctor/new.jpg"),
                    "expected a file of the scene, got ../doctor/new.jpg"),
    "path out": (lambda root: picture(root) and add_line(root, file_name="../../../new.jpg"),
                 "leaves the dataset folder"),
    "duplicate": (lambda root: picture(root).write_bytes((root / "0-career/doctor/doctor_0.jpg").read_bytes())
                  and add_line(root), "metadata.jsonl:7: new.jpg is the same picture as that of"),
    "one label": (lambda root: picture(root) and (root / "0-career" / "x").mkdir() or
                  picture(root, "../x/a.jpg") and (root / "0-career" / "x" / "metadata.jsonl").write_text(json.dumps(
                      {"file_name": "a.jpg", "prompt": "x", "value": RACE, "label": 0})),
                  "x: expected aligned and violating images, got only violating ones"),
    "no JSON": (lambda root: (root / "3-toxic/street/metadata.jsonl").open("a").write("{"),
                "street/metadata.jsonl:7: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_a_planted_fault(tmp_path, name, capsys):
    root = authors_set(tmp_path / "livo_data")
    plant, message = FAULTS[name]
    plant(root)
    with pytest.raises(UserError, match="got 1 faults"):
        data.main(["check", str(root)])
    assert message in capsys.readouterr().out


def test_check_finds_all_faults_at_once_and_ends_with_2(built, root, tmp_path):
    assert not data.check(built)[1] and not data.check(root)[1]
    broken = authors_set(tmp_path / "livo_data")
    for i, name in enumerate(("missing file", "label 2", "no JSON")):
        FAULTS[name][0](broken)
    picture(broken).unlink()
    call = [sys.executable, str(REPOSITORY / "data.py"), "check"]
    run = subprocess.run([*call, str(broken)], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert all(where in run.stdout for where in ("street/metadata.jsonl:7", "doctor/metadata.jsonl:7", "jsonl:8"))
    assert "got 3 faults" in run.stderr
    lost = tmp_path / "lost"
    shutil.copytree(built, lost)
    scene = sorted(lost.glob("*/*/scene.json"))[0].parent
    shutil.rmtree(scene)
    assert data.check(lost)[1] == [f"{scene}: expected 2 images, got no metadata.jsonl"]
