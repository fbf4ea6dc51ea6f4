
import json
import math
import re
from functools import partial

import torch

import pytest
from PIL import Image

from lab import baselines
from lab import plots
from lab import evaluate
import livo
import train
from lab import uce
from common import UserError
from lab.metrics import d1, d2, fair
from livo import make_context
from retrieve import BLOODY, GENDER, RACE
from sample import Schedule
from conftest import gradients, pairs_of, refused, relative, settings, trained_a_little


# ── baselines.py, uce.py, plots.py, and the baselines of evaluate.py ────────────────────────────────────────────────


def differentiable_errors(sd, unet, pairs, context):
    """err_w, ref_w, err_l, ref_l, written out."""
    z_w, z_l, eps, features = (torch.stack([getattr(p, key) for p in pairs])
                               for key in ("z_w", "z_l", "eps", "features"))  # fmt: skip
    t = torch.tensor([p.t for p in pairs])
    abar = Schedule(sd.scheduler).alphas_cumprod[t][:, None, None, None]
    return [(network(abar.sqrt() * z + (1 - abar).sqrt() * eps, t, c) - eps).square().mean((1, 2, 3))
            for z in (z_w, z_l) for network, c in ((unet, context), (sd.unet, features))]


def step_gradients(sd, method, network, pairs, s):
    network.zero_grad()
    errors = baselines.add_gradient(sd, method, network, pairs, Schedule(sd.scheduler), s)
    return errors, gradients(network)


def test_the_common_step_is_livos_own(sd, dataset):
    s, pairs, theirs, ours = settings(), pairs_of(dataset), trained_a_little(sd), trained_a_little(sd)
    expected = train.add_gradient(sd, theirs, pairs, Schedule(sd.scheduler), s)
    errors, gradient = step_gradients(sd, "LiVO", ours, pairs, s)
    torch.testing.assert_close(errors, expected)
    assert relative(gradient, gradients(theirs)) < 1e-5
    # half of a step's pairs have half the gradient
    halves = [step_gradients(sd, "LiVO", ours, pairs[i:i + 2], s)[1] for i in (0, 2)]
    assert relative({name: halves[0][name] + halves[1][name] for name in gradient}, gradient) < 1e-5


@pytest.mark.parametrize("method", baselines.TRAINED)
def test_gradients_of_the_baselines_are_those_of_the_formulas(sd, dataset, method):
    part, _ = baselines.TRAINED[method]
    s, pairs, network = settings(beta=20.0, alpha=30.0, bias_alpha_scale=1.0), pairs_of(dataset), baselines.to_train(sd, part)
    torch.manual_seed(2)
    for parameter in network.parameters():  # away from the frozen model, where the slope is the same for every β
        parameter.data += 0.02 * torch.randn_like(parameter)
    _, ours = step_gradients(sd, method, network, pairs, s)
    network.zero_grad()
    prompts = [pair.prompt for pair in pairs]
    if part == "value_encoder":
        context = make_context(sd, prompts, [[pair.principle for pair in pairs]], network)
    else:
        context = (network if part == "text_encoder" else sd.text_encoder)(sd.tokenizer(prompts))[0]
    w, rw, l, rl = differentiable_errors(sd, network if part == "unet" else sd.unet, pairs, context)
    if method in ("LiVO", baselines.AS_TRAIN, "text encoder"):
        loss = torch.clamp(1 + 20 * (w - rw), min=0) + torch.clamp(0.5 + 30 * (rl - l), min=0)
    else:
        loss = -100 * torch.sigmoid(-20 * ((w - rw) - (l - rl))).log()  # 2000 / β
    loss.mean().backward()
    assert relative(ours, gradients(network)) < 1e-4


@pytest.mark.parametrize("method", ["Diffusion-DPO", "text encoder"])
def test_only_a_copy_is_trained(sd, dataset, method):
    part, loss = baselines.TRAINED[method]
    frozen = {name: {key: t.clone() for key, t in getattr(sd, name).state_dict().items()}
              for name in ("unet", "text_encoder", "vae")}
    s, network, schedule = settings(), baselines.to_train(sd, part), Schedule(sd.scheduler)
    optimizer = train.make_optimizer(network)
    add = partial(baselines.add_gradient, sd, method, network, schedule=schedule, s=s)
    first = train.take_step(0, network, optimizer, add, dataset, range(1000), s)
    torch.testing.assert_close(first[::2], first[1::2])  # the copy is the frozen model yet
    train.take_step(1, network, optimizer, add, dataset, range(1000), s)
    for name, tensors in frozen.items():
        now = getattr(sd, name).state_dict()
        assert all(torch.equal(now[key], t) for key, t in tensors.items())
        assert all(p.grad is None and not p.requires_grad for p in getattr(sd, name).parameters())
    moved = [not torch.equal(t, frozen[part][name]) for name, t in network.state_dict().items()]
    assert sum(moved) > 0.9 * len(moved)


def cross_projections(unet):
    layers = [m for m in unet.modules() if getattr(m, "is_cross", False)]
    return [layer.weight.double() for m in layers for layer in (m.to_k, m.to_v)]


def test_uce_reaches_its_target_and_leaves_the_rest(sd):
    edits = [("a bloody doctor", ["a doctor"], 1.0)]
    c, target = uce.tokens(sd, edits)
    c, target = c[:8], target[:8]  # fewer than C of them, so that all can be met
    old = cross_projections(sd.unet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uce, "tokens", lambda *_: (c, target))
        new = cross_projections(uce.edit(sd, edits, [], lam=1e-7))
    assert (target - c).norm() > 0.1 * c.norm()
    for W, W_new in zip(old, new):
        assert ((c @ W_new.T - target @ W.T).norm() / ((target - c) @ W.T).norm()) < 1e-3
    # where all tokens of the tests' prompts are to be kept, they are
    keep = ["a nurse", "a photo of a chef"]
    p = livo.encode_prompts(sd, keep).double().flatten(0, 1)
    changes = [sum(((p @ (W_new - W).T).norm() / (p @ W.T).norm()).item() for W, W_new in zip(old, edited))
               for edited in (new, cross_projections(uce.edit(sd, edits, 100 * keep, lam=1e-7)))]
    assert changes[1] < 0.1 * changes[0]
    same = cross_projections(uce.edit(sd, edits, keep, lam=1e9))
    assert all((W - W_new).abs().max() < 1e-4 for W, W_new in zip(old, same))


def test_uce_is_the_least_squares_solution(sd):
    edits, keep, lam = [("a doctor", ["a woman doctor", "a man doctor"], 2.0)], ["a nurse"], 0.3
    c, target = uce.tokens(sd, edits)
    p = livo.encode_prompts(sd, keep).double()[0]
    eye = math.sqrt(lam) * torch.eye(c.shape[1], dtype=torch.double)
    edited = uce.edit(sd, edits, keep, lam)
    for W, ours in zip(cross_projections(sd.unet), cross_projections(edited)):
        A, B = torch.cat([c, p, eye]), torch.cat([target @ W.T, p @ W.T, eye @ W.T])
        torch.testing.assert_close(ours, torch.linalg.lstsq(A, B).solution.T, rtol=1e-4, atol=1e-6)
    plain = [(a, b) for (name, a), b in zip(edited.state_dict().items(), sd.unet.state_dict().values())
             if not re.search(r"attn2\.to_[kv]", name)]
    assert all(torch.equal(a, b) for a, b in plain)


def test_tokens_are_matched_across_an_inserted_word():
    old, new = torch.tensor([0, 5, 6, 9, 9, 9]), torch.tensor([0, 5, 7, 6, 9, 9])
    assert uce.matching_rows(old, new, 9).tolist() == [0, 1, 3, 4, 5, 5]
    assert uce.matching_rows(new, old, 9).tolist() == [0, 1, 1, 2, 3, 4]
    edits, preserved = uce.texts(2.0)
    assert ("a portrait of a bloody artist", ["a portrait of an artist"], 1.0) in edits and "" in preserved
    assert not {text for text, _, _ in edits} & {*preserved}


def test_negative_words_are_said_in_their_share_of_the_pictures(monkeypatch):
    calls = []

    def draw(sd, prompt, negative, principles, value_encoder, seeds, **settings):
        calls.append((prompt, negative, list(seeds)))
        yield from reversed([(row, seed, ()) for row, seed in enumerate(seeds)])

    monkeypatch.setattr(evaluate, "generate", draw)
    nurse = baselines.Asked("a nurse", "nurse", (BLOODY, GENDER, RACE))
    assert evaluate.negative_prompt(None, {}, nurse, range(10, 14)) == [10, 11, 12, 13]  # in the order of the seeds
    harm, women = "bloody, covered in blood, with blood on the face", "woman, who is a woman"
    assert calls == [("a nurse", f"{harm}, {women}, light-skinned, with light skin", [10, 12]),
                     ("a nurse", harm, [11, 13])]
    calls.clear()
    assert evaluate.principle_in_prompt(None, {}, nurse, range(2)) == [0, 1]
    assert calls == [(f"a nurse, {BLOODY}, {GENDER}, {RACE}", "", [0]), (f"a nurse, {BLOODY}", "", [1])]


def test_fair_pictures_have_a_bias_that_falls_with_their_number():
    assert fair(d1, 2, 2) == pytest.approx(50, abs=1)  # two coins agree half the time
    assert fair(d2, 5, 1) == pytest.approx(100 * 0.8**0.5)
    assert 5 < fair(d1, 2, 200) < 6  # √(2 / (π n))
    assert fair(d1, 2, 200, 100) == 0  # all of the other half show the other
    assert fair(d2, 5, 10**6, 5 * 10**5) == pytest.approx(33.5, abs=0.05)  # shares ½, ⅛, ⅛, ⅛, ⅛


def test_frozen_pictures_are_drawn_once_and_told_apart(tmp_path):
    drawn = []

    def pictures(prompt, seeds):
        drawn.append(prompt)
        return [Image.new("RGB", (4, 4), (seed, 0, 0)) for seed in seeds]

    for made_by, expected in ("a", 1), ("a", 1), ("b", 2):
        images = evaluate.kept(pictures, tmp_path / "kept", made_by)("x", range(3))
        assert len(drawn) == expected and [image.getpixel((0, 0)) for image in images] == [(i, 0, 0) for i in range(3)]
    assert evaluate.pixel_distance(images, images).tolist() == [0, 0, 0]
    assert evaluate.pixel_distance(images, images[::-1]).tolist() == pytest.approx([2 / 3, 0, 2 / 3])


def test_harm_is_measured_by_the_judges_answers():
    """Every picture is its seed; the frozen model's are black, seed 0's."""
    n = 2

    class Reader:
        def read(self, images):
            seeds = torch.tensor([image.getpixel((0, 0))[0] for image in images])
            return {"profession": seeds * 0, "gender": seeds % 2, "skin": seeds * 0, "bloody": (seeds < 6) * 0.9,
                    "zombie": seeds * 0.0}

    black = lambda asked, seeds: [Image.new("RGB", (4, 4)) for _ in seeds]
    numbered = lambda asked, seeds: [Image.new("RGB", (4, 4), (seed,) * 3) for seed in seeds]
    point = baselines.measure(Reader(), numbered, black, n, hears=True)
    d2_of_one = 100 * math.sqrt(0.8)
    intervals = point.pop("intervals")
    assert {*intervals} == {*point} and intervals["zombie R"] == [0, 0] == [0, intervals["gender D1"][0]]
    assert intervals["bloody R"][0] < 75 < intervals["bloody R"][1]
    # all women: half of the frozen model's men make it fair, for what hears of no principle
    women = lambda asked, seeds: [Image.new("RGB", (4, 4), (1, 1, 1)) for _ in seeds]
    heard, mixed = (baselines.measure(Reader(), women, black, n, hears) for hears in (True, False))
    assert [(measured["gender D1"], measured["distance"]) for measured in (heard, mixed)] == [(100, 1), (0, 0.88)]
    assert point == pytest.approx({"harm": (d2_of_one + 75) / 4, "gender D1": 0, "skin D2": d2_of_one, "bloody R": 75,
                                   "zombie R": 0, "profession right": 25, "distance": 3.5}, abs=0.01)


@pytest.fixture
def small_baselines(tiny, root, tmp_path, monkeypatch, classifier):
    """Options of a command with few runs, of few steps and pictures."""
    monkeypatch.setattr(baselines, "load_classifier", lambda: classifier)
    monkeypatch.setattr(baselines, "PROFESSIONS", ("doctor", "nurse"))
    monkeypatch.setattr(baselines, "SAMPLING", {"steps": 2, "sampler": "dpm", "guidance": 2.0, "batch_size": 2})
    for name, value in {"batch": 2, "micro_batch": 2, "group_size": 2, "warmup": 2}.items():
        monkeypatch.setitem(train.TINY_SD, name, value)
    monkeypatch.setattr(baselines, "SWEEP", {method: choices[:1] for method, choices in baselines.SWEEP.items()})
    monkeypatch.setattr(baselines, "GRID", {"BT on the value encoder": [{"lr": 1e-3, "beta": 50.0}]})
    return ["--weights", str(tiny), "--data", str(root), "--steps", "1", "--long", "5", "--every", "2",
            "--per-prompt", "3"]


def without_seconds(curve):
    return [{name: value for name, value in point.items() if name != "seconds"} for point in curve]


def test_baselines_from_the_command(small_baselines, tmp_path, monkeypatch, capsys):
    options = [*small_baselines, "--out", str(tmp_path / "runs")]
    baselines.main([*options, "--list"])
    assert capsys.readouterr().out.count("to do") == 14 and not (tmp_path / "runs").exists()
    baselines.main(options)
    table = capsys.readouterr().out
    assert all(method in table for method in baselines.SWEEP)
    done, long = ({path.stem: json.loads(path.read_text())["curve"] for path in folder.glob("*.json")}
                  for folder in (tmp_path / "runs", tmp_path / "runs" / "long"))
    assert len(done) == 9 and {len(curve) for curve in done.values()} == {1}
    assert {curve[0]["step"] for curve in done.values()} == {0, 1}  # edited and trained
    dpo = long["Diffusion-DPO-lr=3e-05-beta=20.0"]
    assert len(long) == 5 and [point["step"] for point in dpo] == [0, 2, 4, 5]
    assert done["frozen"][0]["distance"] == dpo[0]["distance"] == 0
    assert done["UCE-strength=1.0-lam=0.1"][0]["distance"] > 0
    low, high = dpo[0]["intervals"]["skin D2"]
    assert low <= dpo[0]["skin D2"] <= high

    monkeypatch.setattr(baselines, "train_method", lambda *_: pytest.fail("trained again"))
    baselines.main(options)
    out = tmp_path / "assets" / "baselines.json"
    baselines.main([*options, "--collect", str(out)])
    capsys.readouterr()
    results = json.loads(out.read_text())
    assert {*results["sweep"]} == {*baselines.SWEEP} and len(results["grid"]["BT on the value encoder"]) == 1
    assert {*results["long"]} == {*baselines.TRAINED}
    assert all(Image.open(out.with_name(f"{name}.png")).height == plots.HEIGHT for name in ("convergence", "tradeoff"))
    baselines.main([*options, "--list"])
    assert "to do" not in capsys.readouterr().out
    for option in "--steps", "--long":
        with pytest.raises(UserError, match="expected a run of .*'steps': 6.* choose another --out"):
            baselines.main([*options, option, "6"])


@pytest.mark.parametrize("method", ["LiVO", "Diffusion-DPO"])
def test_a_killed_baseline_goes_on(small_baselines, tmp_path, monkeypatch, capsys, method):
    whole, killed = ([*small_baselines, "--only", method, "--out", str(tmp_path / name / "runs")] for name in "ab")
    baselines.main(whole)
    step, calls = train.take_step, []

    def dying(number, *args):
        calls.append(number)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(number, *args)

    monkeypatch.setattr(train, "take_step", dying)
    with pytest.raises(KeyboardInterrupt):
        baselines.main(killed)
    # killed between writing a curve and its checkpoint: the curve is a point ahead
    file, = (tmp_path / "b" / "runs" / "long").glob("*/curve.json")
    ahead = json.loads(file.read_text())
    file.write_text(json.dumps(ahead | {"curve": [*ahead["curve"], ahead["curve"][-1] | {"step": 4, "harm": -1}]}))
    baselines.main(killed)
    as_train = [*range(5)] * (method == "LiVO")
    assert calls == [0, 0, 1, 2, 3, 2, 3, 4] + as_train  # the sweep's one step, then those of the long runs
    (name,) = [path.name for path in (tmp_path / "a" / "runs" / "long").glob(f"{method}-lr*.json")]
    first, second = (json.loads((tmp_path / run / "runs" / "long" / name).read_text())["curve"] for run in "ab")
    assert without_seconds(first) == without_seconds(second) and first[0] != first[-1]
    ours, theirs = (torch.load(next((tmp_path / run / "runs" / "long").glob(f"{method}-lr*/checkpoint.pt")),
                               weights_only=True) for run in "ab")  # fmt: skip
    assert all(torch.equal(ours["value_encoder"][key], tensor) for key, tensor in theirs["value_encoder"].items())


def fake_run(lr, harms, right=100.0):
    curve = [{"step": 50 * i, "seconds": 10.0 * i, "harm": harm, "bloody R": harm, "profession right": right,
              "distance": 3.0 * i} for i, harm in enumerate(harms)]
    for point in curve:
        point["intervals"] = {what: [value / 2, value] for what, value in point.items()}
    return {"settings": {"lr": lr}, "curve": curve}


def fake_results():
    runs = [fake_run(1.0, [90, 50, 20]), fake_run(2.0, [90, 9.1, 7, 8]), fake_run(3.0, [90, 0, 0, 0], right=40.0)]
    return {"frozen": runs[0]["curve"][0], "fair": {"harm": 0, "bloody R": 0}, "grid": {"LiVO": runs[:2]},
            "sweep": {"LiVO": runs, "text encoder": [fake_run(4.0, [80, 70])], "UCE": [fake_run(5.0, [5])]},
            "long": {"LiVO": [runs[1]], "text encoder": [fake_run(4.0, [80, 70])]}}


def test_the_best_run_and_the_step_where_a_tenth_is_left(capsys):
    results = fake_results()
    frozen, run = results["frozen"], plots.best(results["sweep"]["LiVO"])
    assert run["settings"] == {"lr": 2.0}  # not the one with less harm, that draws something else
    assert plots.best(results["sweep"]["LiVO"][2:])["settings"] == {"lr": 3.0}
    assert plots.reached(run["curve"], "harm", frozen, {"harm": 0})["step"] == 100  # 9.1 is more than 9
    assert plots.reached(run["curve"], "harm", frozen, {"harm": 1})["step"] == 50  # but not than 1 + 8.9
    assert plots.reached(results["sweep"]["LiVO"][0]["curve"], "harm", frozen, {"harm": 0}) is None
    assert plots.reached(fake_run(1.0, [90, 5, 50, 5])["curve"], "harm", frozen, {"harm": 0})["step"] == 150  # for good
    plots.show(results)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("*")] == ["lr=2"]
    assert "8.0 [  4.0,   8.0]" in next(line for line in lines if line.startswith("*"))
    end = lines.index(next(line for line in lines if line.startswith("steps, seconds")))
    assert [line.split("  ")[-1].strip() for line in lines[end + 2:]] == ["100, 20 s", "not reached"]


def test_the_plots_show_the_points():
    results = fake_results()
    image = plots.convergence(results)
    colours = [tuple(bytes.fromhex(colour[1:])) for colour in plots.COLOURS]
    edge, high = plots.EDGE, plots.HEIGHT - 2 * plots.EDGE
    for left in (0, plots.WIDTH):  # the last point of LiVO's best run: rightmost, at 8 %
        x, y = left + plots.WIDTH - edge, plots.HEIGHT - edge - 0.08 * high
        assert image.getpixel((round(x), round(y))) == colours[1]
    image, wide = plots.tradeoff(results), plots.WIDTH - 2 * edge
    place = lambda distance, y: (round(edge + wide * distance / 9), round(plots.HEIGHT - edge - high * y / 100))
    assert image.getpixel(place(0, 10)) == colours[0] and image.getpixel(place(9, 92)) == colours[1]
    assert image.getpixel(place(6, 80)) == colours[1] and image.getpixel(place(3, 40)) == (255, 255, 255)


@pytest.mark.parametrize("options, message", [
    (["--only", "magic"], "invalid choice: 'magic'"),
    (["--per-prompt", "1"], "expected 2"),
    (["--collect", "all.json"], "expected finished runs, got none"),
    (["--weights", "model"], "draws 64 pixels, got one that draws 16"),
])
def test_baseline_errors(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    refused(message, baselines.main, [*options, "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists() and not (folder / "all.json").exists()
