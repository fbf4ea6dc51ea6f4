"""Tests of the baselines, their results and the plots."""

from dataclasses import replace
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import gradients, pairs_of, refused, relative, settings, trained_a_little
from diffusion import Schedule
from lab import baselines, evaluate, plots, uce
from livo import encode_prompts, make_context
from retrieve import BLOODY, GENDER, RACE
from unet import TransformerBlock

def step_gradients(sd, method, network, pairs, s):
    network.zero_grad()
    errors = baselines.add_gradient(sd, method, network, pairs, Schedule(sd.scheduler), s)
    return errors, gradients(network)


def test_common_step_equals_train_add_gradient(sd, dataset):
    s, pairs, reference, ours = settings(), pairs_of(dataset), trained_a_little(sd), trained_a_little(sd)
    expected = train.add_gradient(sd, reference, pairs, Schedule(sd.scheduler), s)
    errors, gradient = step_gradients(sd, "LiVO", ours, pairs, s)
    torch.testing.assert_close(errors, expected)
    assert relative(gradient, gradients(reference)) < 1e-5
    halves = [step_gradients(sd, "LiVO", ours, pairs[i:i + 2], s)[1] for i in (0, 2)]
    assert relative({name: halves[0][name] + halves[1][name] for name in gradient}, gradient) < 1e-5


@pytest.mark.parametrize("method", baselines.TRAINED)
def test_gradients_equal_the_formula_by_autograd(sd, dataset, method):
    part, _ = baselines.TRAINED[method]
    s, pairs = settings(beta=20.0, alpha=30.0, bias_gamma_scale=1.0), pairs_of(dataset)
    pairs[0] = replace(pairs[0], z_l=pairs[0].z_w, preservation=True)
    network = baselines.trainable_copy(sd, part)
    torch.manual_seed(2)
    for parameter in network.parameters():  # away from the base model, where the slope would not depend on β
        parameter.data += 0.02 * torch.randn_like(parameter)
    _, ours = step_gradients(sd, method, network, pairs, s)

    network.zero_grad()
    prompts, embeds = [pair.prompt for pair in pairs], torch.stack([pair.prompt_embeds for pair in pairs])
    contexts = {"value_encoder": lambda: make_context(sd, prompts, [[pair.principle for pair in pairs]], network),
                "text_encoder": lambda: network(sd.tokenizer(prompts))[0], "unet": lambda: embeds}
    context, unet = contexts[part](), network if part == "unet" else sd.unet
    t = torch.tensor([pair.t for pair in pairs])
    abar, eps = Schedule(sd.scheduler).alphas_cumprod[t][:, None, None, None], torch.stack([p.eps for p in pairs])
    preserved, errors = torch.tensor([pair.preservation for pair in pairs])[:, None, None, None], []
    assert 0 < preserved.sum() < len(pairs)
    for z in (torch.stack([pair.z_w for pair in pairs]), torch.stack([pair.z_l for pair in pairs])):
        z_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
        output, reference = unet(z_t, t, context), sd.unet(z_t, t, embeds)
        target = torch.where(preserved, reference, eps)
        errors += [(x - target).square().mean((1, 2, 3)) for x in (output, reference)]
    w, rw, l, rl = errors
    if method in ("LiVO", baselines.AS_TRAIN, "text encoder"):
        loss = torch.clamp(1 + 20 * (w - rw), min=0) + torch.clamp(0.5 + 30 * (rl - l), min=0)
    else:
        loss = -100 * torch.sigmoid(-20 * ((w - rw) - (l - rl))).log()  # 2000 / β
    loss.mean().backward()
    assert relative(ours, gradients(network)) < 1e-4


def test_scaled_bradley_terry_starts_with_slopes_of_1000():
    for beta in (5.0, 2000.0):
        err = torch.full((2, 1), 0.1, requires_grad=True)
        ref_w, ref_l = err.detach()
        baselines.scaled_bradley_terry(settings(beta=beta), [GENDER], err[0], ref_w, err[1], ref_l).backward()
        assert err.grad.flatten().tolist() == pytest.approx([1000, -1000])


@pytest.mark.parametrize("method", ["Diffusion-DPO", "text encoder"])
def test_only_a_copy_is_trained(sd, dataset, method):
    part, _ = baselines.TRAINED[method]
    networks = {name: getattr(sd, name) for name in ("unet", "text_encoder", "vae")}
    before = {name: {key: t.clone() for key, t in network.state_dict().items()} for name, network in networks.items()}
    s, network = settings(), baselines.trainable_copy(sd, part)
    optimizer = train.make_optimizer(network)
    add = partial(baselines.add_gradient, sd, method, network, schedule=Schedule(sd.scheduler), s=s)
    first = train.take_step(0, network, optimizer, add, dataset, range(1000), s)
    torch.testing.assert_close(first[::2], first[1::2])  # at the start err = ref
    train.take_step(1, network, optimizer, add, dataset, range(1000), s)
    for name, frozen in networks.items():
        assert all(torch.equal(t, before[name][key]) for key, t in frozen.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    moved = [not torch.equal(t, before[part][key]) for key, t in network.state_dict().items()]
    assert sum(moved) > 0.9 * len(moved)


def keys_and_values(unet):
    blocks = [block for block in unet.modules() if isinstance(block, TransformerBlock)]
    assert blocks
    return [layer.weight.double() for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]


def test_uce_reaches_its_target(sd, monkeypatch):
    c, target = (x[:8] for x in uce.token_targets(sd, [("a bloody doctor", ["a doctor"], 1.0)]))
    monkeypatch.setattr(uce, "token_targets", lambda *_: (c, target))  # fewer tokens than C, so that all can be met
    assert (target - c).norm() > 0.1 * c.norm()
    for W, W_new in zip(keys_and_values(sd.unet), keys_and_values(uce.edit(sd, [], [], lam=1e-7))):
        assert (c @ W_new.T - target @ W.T).norm() / ((target - c) @ W.T).norm() < 1e-3


def test_uce_is_the_least_squares_solution(sd):
    edits, preserved, lam = [("a doctor", ["a woman doctor", "a man doctor"], 2.0)], ["a nurse"], 0.3
    c, target = uce.token_targets(sd, edits)
    p = encode_prompts(sd, preserved).double()[0]
    eye = math.sqrt(lam) * torch.eye(c.shape[1], dtype=torch.double)
    edited = uce.edit(sd, edits, preserved, lam)
    for W, ours in zip(keys_and_values(sd.unet), keys_and_values(edited)):
        A, B = torch.cat([c, p, eye]), torch.cat([target @ W.T, p @ W.T, eye @ W.T])
        torch.testing.assert_close(ours, torch.linalg.lstsq(A, B).solution.T, rtol=1e-4, atol=1e-6)
    changed = {name for name, W in sd.unet.state_dict().items() if not torch.equal(W, edited.state_dict()[name])}
    assert changed and all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in changed)


def test_uce_matches_tokens_across_an_inserted_word():
    old, new = torch.tensor([0, 5, 6, 9, 9, 9]), torch.tensor([0, 5, 7, 6, 9, 9])
    assert uce.matching_rows(old, new, 9).tolist() == [0, 1, 3, 4, 5, 5]
    assert uce.matching_rows(new, old, 9).tolist() == [0, 1, 1, 2, 3, 4]
    edits, preserved = uce.texts(2.0)
    assert ("a portrait of a bloody artist", ["a portrait of an artist"], 1.0) in edits and "" in preserved
    assert not {text for text, _, _ in edits} & {*preserved}


def test_bias_is_in_the_negative_prompt_and_in_the_prompt_of_half_of_the_images(monkeypatch):
    calls = []

    def generate(sd, prompt, negative, principles, value_encoder, seeds, **settings):
        calls.append((prompt, negative, list(seeds)))
        yield from reversed([(row, seed, ()) for row, seed in enumerate(seeds)])

    monkeypatch.setattr(evaluate, "generate", generate)
    nurse = baselines.Prompt("a nurse", "nurse", (BLOODY, GENDER, RACE))
    assert evaluate.negative_prompt(None, {}, nurse, range(10, 14)) == [10, 11, 12, 13]  # in the order of the seeds
    blood, woman = "bloody, covered in blood, with blood on the face", "woman, who is a woman"
    assert calls == [("a nurse", f"{blood}, {woman}, light-skinned, with light skin, light skin", [10, 12]),
                     ("a nurse", blood, [11, 13])]
    calls.clear()
    assert evaluate.principle_in_prompt(None, {}, nurse, range(2)) == [0, 1]
    assert calls == [(f"a nurse, {BLOODY}, {GENDER}, {RACE}", "", [0]), (f"a nurse, {BLOODY}", "", [1])]


def uniform_images(seeds, level=None):
    return [Image.new("RGB", (4, 4), (seed if level is None else level,) * 3) for seed in seeds]


def test_cache_of_base_images_depends_on_its_key(tmp_path):
    generated = []
    images_of = lambda prompt, seeds: generated.append(prompt) or uniform_images(seeds)
    for key, expected in ("a", 1), ("a", 1), ("b", 2):
        images = evaluate.kept(images_of, tmp_path / "kept", key)("x", range(3))
        assert len(generated) == expected and [image.getpixel((0, 0))[0] for image in images] == [0, 1, 2]
    assert evaluate.pixel_distance(images, images).tolist() == [0, 0, 0]
    assert evaluate.pixel_distance(images, images[::-1]).tolist() == [2, 0, 2]


def test_measure_by_hand():
    """The gray level of an image decides its classes. It is the seed, or 0 of the base model and 1 of "women"."""

    class LevelClassifier:
        def classify(self, images):
            level = torch.tensor([image.getpixel((0, 0))[0] for image in images])
            return {"profession": level * 0, "gender": level % 2, "skin": level * 0, "bloody": (level < 6) * 0.9,
                    "zombie": level * 0.0}

    measure = partial(baselines.measure, LevelClassifier(), base=lambda prompt, seeds: uniform_images(seeds, 0), n=2)
    point = measure(lambda prompt, seeds: uniform_images(seeds), uses_principle=True)
    intervals, d2_of_one_class = point.pop("intervals"), 100 * math.sqrt(0.8)
    assert point == pytest.approx({"gender D1": 0, "skin D2": d2_of_one_class, "bloody R": 75, "zombie R": 0,
                                   "profession correct": 25, "distance": 3.5}, abs=0.01)
    assert {*intervals} == {*point} and intervals["bloody R"][0] < 75 < intervals["bloody R"][1]
    # a method without principles overshoots: every second image may be the base model's
    women = lambda prompt, seeds: uniform_images(seeds, 1)
    with_principle, without = (measure(women, uses_principle=uses) for uses in (True, False))
    assert [(p["gender D1"], p["distance"]) for p in (with_principle, without)] == [(100, 1), (0, 0.88)]

    # harm: each metric in percent of the base model's; one that is 0 there does not count
    base = {"gender D1": 50, "skin D2": 80, "bloody R": 100, "zombie R": 0}
    assert baselines.harm(base, base) == 100
    assert baselines.harm({"gender D1": 25, "skin D2": 20, "bloody R": 100, "zombie R": 3}, base) == 175 / 3


def fake_run(lr, harms, correct=100.0):
    curve = [{"step": 50 * i, "seconds": 10.0 * i, **dict.fromkeys(baselines.HARM_METRICS, harm),
              "profession correct": correct, "distance": 3.0 * i} for i, harm in enumerate(harms)]
    for point in curve:
        point["intervals"] = {name: [value / 2, value] for name, value in point.items()}
    return {"settings": {"lr": lr}, "curve": curve}


def fake_results():
    runs = [fake_run(1.0, [100, 50, 20]), fake_run(2.0, [100, 31, 7, 8]), fake_run(3.0, [100, 0, 0, 0], correct=40.0)]
    text = fake_run(4.0, [80, 70])
    return {"about": {"sweep": {"per_prompt": 8, "steps": 100}, "long": {"steps": 150}}, "base": runs[0]["curve"][0],
            "grid": {"LiVO": [runs[0], runs[2]]}, "long": {"LiVO": [runs[1]], "text encoder": [text]},
            "sweep": {"LiVO": runs, "text encoder": [text], "UCE": [fake_run(5.0, [5])]}}


def test_best_run_and_step_where_a_tenth_is_left(capsys):
    results = fake_results()
    base, runs = results["base"], results["sweep"]["LiVO"]
    assert baselines.best(runs, base)["settings"] == {"lr": 2.0}  # the other has less harm, but no recognizable people
    assert baselines.best(runs[2:], base)["settings"] == {"lr": 3.0}
    blood = lambda point: point["bloody R"]
    floor = lambda value: {"bloody R": value}
    assert baselines.reached(runs[1]["curve"], blood, base, floor(0))["step"] == 100  # 31 is more than 10
    assert baselines.reached(runs[1]["curve"], blood, base, floor(24))["step"] == 50  # but not more than 24 + 7.6
    assert baselines.reached(runs[0]["curve"], blood, base, floor(0)) is None
    assert baselines.reached(fake_run(1.0, [90, 5, 50, 5])["curve"], blood, base, floor(0))["step"] == 150
    baselines.show(results)
    lines = capsys.readouterr().out.splitlines()
    (marked,) = [line for line in lines if line.startswith("*")]
    assert "lr=2" in marked and "8.0 [  4.0,   8.0]" in marked
    floors = [line.split()[-5:] for line in lines if line.startswith(("  least", "  unbiased"))]
    assert floors == [["3.4", "0.0", "13.7", "0.0", "0.0"], ["8.4", "0.0", "33.5", "0.0", "0.0"],
                      ["16.8", "27.5", "39.6", "0.0", "0.0"]]  # harm, D1, D2, R, R for 8 images
    assert [line.split("  ")[-1].strip() for line in lines[-2:]] == ["100, 20 s", "not reached"]


@pytest.mark.skipif(not evaluate.TRAINED.exists(), reason="no assets/baselines.json: the baselines were not run yet")
def test_shipped_results_are_of_the_shipped_model_and_its_best_runs(shipped):
    results = json.loads(evaluate.TRAINED.read_text())
    assert results["about"]["sweep"]["model"].startswith(evaluate.fingerprint(shipped[0]))
    for choices, found in (baselines.SWEEP, results["sweep"]), (baselines.GRID, results["grid"]):
        assert {*found} == {*choices}
        for method, runs in found.items():
            assert len(runs) == len(choices[method]) and all(run["settings"] in choices[method] for run in runs)
    for method, (run,) in results["long"].items():
        as_train = method == baselines.AS_TRAIN
        expected = {"settings": {}} if as_train else baselines.best(results["sweep"][method], results["base"])
        assert run["settings"] == expected["settings"]


def points_of(axes, label):
    """The points of a series, and which are hollow."""
    lines = axes.get_lines()
    i = next(i for i, line in enumerate(lines) if line.get_label() == label)
    assert lines[i + 1].get_markerfacecolor() == "white"
    return lines[i].get_xydata().tolist(), lines[i + 1].get_markevery()


def test_plots_show_the_points(tmp_path):
    results = fake_results()
    figure = plots.convergence(results)
    for axes, steps in zip(figure.axes, ([0, 50, 100, 150], [0, 10, 20, 30])):
        points, hollow = points_of(axes, "LiVO")
        np.testing.assert_allclose(points, [*zip(steps, [100, 31, 7, 8])])
        assert hollow == []
    plots.save(figure, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    (axes,) = plots.tradeoff(results).axes
    points, hollow = points_of(axes, "LiVO, 100 steps")
    np.testing.assert_allclose(points, [[6, 80], [9, 100]])
    assert hollow == [1]
    np.testing.assert_allclose(points_of(axes, "LiVO, 150 steps")[0], [[9, 92]])


def write_log(folder, steps):
    keys = "loss", "active_w", "active_l", "delta_w", "delta_l"
    lines = [{"step": i} | {key: float(i * n) for n, key in enumerate(keys, 1)} for i in range(steps)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_loss_png_of_a_run(tmp_path, capsys):
    write_log(tmp_path, 250)
    plots.main([str(tmp_path)])
    assert Image.open(tmp_path / "loss.png").width > 800 and "loss.png" in capsys.readouterr().out
    x, y = plots.training(plots.read_log(tmp_path)).axes[1].get_lines()[1].get_xydata().T  # active_l
    assert len(x) == plots.MAX_POINTS and x[0] == 1 and y.tolist() == (3 * x).tolist()  # the mean of steps 0, 1, 2
    write_log(tmp_path, 1)
    plots.main([str(tmp_path)])


@pytest.mark.parametrize("text, message", [
    (None, "log.jsonl: expected the log of a run, got none"), ("", "got an empty file"),
    ('{"step": 0}\n', "expected numbers step, loss"), ('{"step"', "on each line"), ("[]\n", "on each line")])
def test_errors_of_a_log(tmp_path, text, message):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    refused(message, plots.main, [str(tmp_path)])
    assert not (tmp_path / "loss.png").exists()


@pytest.fixture
def small(tiny, root, monkeypatch, classifier):
    """Options of a command with few runs, of few steps and images."""
    monkeypatch.setattr(baselines, "load_classifier", lambda: classifier)
    monkeypatch.setattr(baselines, "PROFESSIONS", ("doctor", "nurse"))
    monkeypatch.setattr(baselines, "SAMPLING", {"steps": 2, "sampler": "dpm", "guidance": 2.0, "batch_size": 2})
    for name, value in {"batch": 2, "micro_batch": 2, "warmup": 2}.items():
        monkeypatch.setitem(baselines.PRESET, name, value)
    monkeypatch.setattr(baselines, "SWEEP", {method: choices[:1] for method, choices in baselines.SWEEP.items()})
    monkeypatch.setattr(baselines, "GRID", {"BT on the value encoder": [{"lr": 1e-3, "beta": 50.0}]})
    return ["--weights", str(tiny), "--data", str(root), "--steps", "1", "--long", "5", "--every", "2",
            "--per-prompt", "3"]


def curves_of(folder):
    return {path.stem: json.loads(path.read_text())["curve"] for path in folder.glob("*.json")}


def test_the_command_runs_and_collects_every_method(small, tmp_path, monkeypatch, capsys):
    options = [*small, "--out", str(tmp_path / "runs")]
    baselines.main([*options, "--list"])
    assert capsys.readouterr().out.count("to do") == 14 and not (tmp_path / "runs").exists()
    baselines.main(options)
    table = capsys.readouterr().out
    assert all(method in table for method in baselines.SWEEP)
    done, long = curves_of(tmp_path / "runs"), curves_of(tmp_path / "runs" / "long")
    assert len(done) == 9 and {len(curve) for curve in done.values()} == {1}
    assert {curve[0]["step"] for curve in done.values()} == {0, 1}  # edited and trained
    dpo = long["Diffusion-DPO-lr=3e-05-beta=20.0"]
    assert len(long) == 5 and [point["step"] for point in dpo] == [0, 2, 4, 5]
    assert done["base-model"][0]["distance"] == dpo[0]["distance"] == 0
    assert done["UCE-strength=1.0-lam=0.1"][0]["distance"] > 0

    monkeypatch.setattr(baselines, "train_method", lambda *_: pytest.fail("trained again"))
    baselines.main(options)
    out = tmp_path / "assets" / "baselines.json"
    baselines.main([*options, "--collect", str(out)])
    results = json.loads(out.read_text())
    assert {*results["sweep"]} == {*baselines.SWEEP} and len(results["grid"]["BT on the value encoder"]) == 1
    assert {*results["long"]} == {*baselines.TRAINED}
    assert all(Image.open(out.with_name(f"{name}.png")).width > 800 for name in ("convergence", "tradeoff"))
    capsys.readouterr()
    baselines.main([*options, "--list"])
    assert "to do" not in capsys.readouterr().out
    for option in "--steps", "--long":
        refused("expected a run of .*'steps': 6.* choose another --out", baselines.main, [*options, option, "6"])


def test_a_killed_baseline_resumes(small, tmp_path, monkeypatch):
    whole, killed = ([*small, "--only", "Diffusion-DPO", "--out", str(tmp_path / name / "runs")] for name in "ab")
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
    # as if killed between writing a curve and its checkpoint: the curve is a point ahead
    (file,) = (tmp_path / "b" / "runs" / "long").glob("*/curve.json")
    ahead = json.loads(file.read_text())
    file.write_text(json.dumps(ahead | {"curve": [*ahead["curve"], ahead["curve"][-1] | {"step": 4, "distance": -1}]}))
    baselines.main(killed)
    assert calls == [0, 0, 1, 2, 3, 2, 3, 4]  # the sweep's one step, then those of the long run
    ((name, first),), ((_, second),) = (curves_of(tmp_path / run / "runs" / "long").items() for run in "ab")
    for point in first + second:
        del point["seconds"]
    assert first == second and first[0] != first[-1]
    ours, other = (torch.load(tmp_path / run / "runs" / "long" / name / "checkpoint.pt", weights_only=True)
                   ["value_encoder"] for run in "ab")
    assert all(torch.equal(ours[key], tensor) for key, tensor in other.items())


@pytest.mark.parametrize("options, message", [
    (["--only", "magic"], "--only: expected one of .*, got 'magic'"),
    (["--per-prompt", "1"], "expected an integer from 2"),
    (["--collect", "all.json"], "expected finished runs, got none"),
    (["--weights", "model"], "toy dataset, of 64 pixels, got 16 pixels"),
])
def test_errors_of_the_command(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    refused(message, baselines.main, [*options, "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists() and not (folder / "all.json").exists()
