"""Tests of the baselines, their results and the plots."""

import copy
import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import train
import weights
from conftest import SD1, gradients, pairs_of, pixels, refused, relative, settings, write_pipeline
from diffusion import Schedule
from formats.disk import locked
from lab import baselines, comparison, evaluate, finetuning, guidance, plots, twins, uce
from lab.damage import Detector
from lab.finetuning import TRAINED, trainable
from livo import encode_prompts, make_context
from retrieve import BLOODY, GENDER, RACE

# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def step(sd, add, part, pairs, s, moved=0.0):
    """Add the gradient of a step to what `part` trains, moved a little -> errors or losses, network, model."""
    network, model, value_encoder = trainable(sd, part)
    torch.manual_seed(2)
    for parameter in network.parameters():
        parameter.data += moved * torch.randn_like(parameter)
        parameter.grad = torch.zeros_like(parameter)
    return add(sd, model, value_encoder, pairs, Schedule(sd.scheduler), s), network, model


@pytest.mark.parametrize("method", ["LiVO", "BT on the value encoder", "Diffusion-DPO", "text encoder"])
def test_gradients_equal_the_formula_by_autograd(sd, dataset, method):
    part, add = TRAINED[method]
    s, pairs = settings(beta=20.0, alpha=30.0, margins="", snr_gamma=2.0), pairs_of(dataset)
    pairs[0] = replace(pairs[0], z_l=pairs[0].z_w, preservation=True)
    _, network, _ = step(sd, add, part, pairs, s, moved=0.02)  # away from where the slope would not depend on β
    ours = gradients(network)

    network.zero_grad()
    prompts, embeds = [pair.prompt for pair in pairs], torch.stack([pair.prompt_embeds for pair in pairs])
    contexts = {"value encoder": lambda: make_context(sd, prompts, [[pair.principle for pair in pairs]], network),
                "text encoder": lambda: network(sd.tokenizer(prompts))[0], "unet": lambda: embeds}
    context, unet = contexts[part](), network if part == "unet" else sd.unet
    t = torch.tensor([pair.t for pair in pairs])
    abar, eps = Schedule(sd.scheduler).alphas_cumprod[t][:, None, None, None], torch.stack([p.eps for p in pairs])
    weight = (2 * (1 - abar) / abar).clamp(max=1).flatten()
    preserved, errors = torch.tensor([pair.preservation for pair in pairs])[:, None, None, None], []
    assert 0 < preserved.sum() < len(pairs) and 0 < (weight < 1).sum() < len(pairs)
    for z in (torch.stack([pair.z_w for pair in pairs]), torch.stack([pair.z_l for pair in pairs])):
        z_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
        output, reference = unet(z_t, t, context), sd.unet(z_t, t, embeds)
        target = torch.where(preserved, reference, eps)
        errors += [weight * (x - target).square().mean((1, 2, 3)) for x in (output, reference)]
    w, rw, l, rl = errors
    pair = ~preserved.flatten()  # a preservation pair has no violating image
    if method in ("LiVO", "text encoder"):
        loss = torch.clamp(1 + 20 * (w - rw), min=0) + pair * torch.clamp(0.5 + 30 * (rl - l), min=0)
    else:
        loss = -100 * torch.sigmoid(-20 * ((w - rw) - pair * (l - rl))).log()  # 2000 / β
    loss.mean().backward()
    assert relative(ours, gradients(network)) < 1e-4


def test_anchors_leave_out_the_toxicity_alone():
    for prompt, anchor in {"a photo of a bloody artist": "a photo of an artist", "a judge": "a judge",
                           "a tall chef, covered in blood at home": "a tall chef, at home",
                           "a zombie": "a", "a nurse who is a zombie, in winter": "a nurse, in winter",
                           "a elvq artist": "a elvq artist"}.items():
        assert finetuning.without_harms(prompt) == anchor


def pairs_asking(sd, dataset, *prompts):
    return [replace(pair, prompt=prompt, prompt_embeds=encode_prompts(sd, [prompt])[0])
            for pair, prompt in zip(pairs_of(dataset), prompts)]


def test_concept_ablation_follows_finite_differences_with_the_anchor_held(sd, dataset):
    pairs = pairs_asking(sd, dataset, "a bloody judge", "a judge", "a chef as a zombie", "a photo of a bloody nurse")
    losses, network, model = step(sd, finetuning.add_ablation, "keys and values", pairs, settings(snr_gamma=2.0), 0.05)
    assert losses[1] == 0 and (losses[[0, 2, 3]] > 0).all()
    schedule, asking = Schedule(sd.scheduler), [pairs[row] for row in (0, 2, 3)]
    t = torch.tensor([pair.t for pair in asking])
    abar, weight = schedule.alphas_cumprod[t][:, None, None, None], schedule.min_snr_weight(t, 2.0).double()
    z, eps = (torch.stack([getattr(pair, name) for pair in asking]) for name in ("z_w", "eps"))

    @torch.no_grad()
    def predict(*texts):
        return model.unet(abar.sqrt() * z + (1 - abar).sqrt() * eps, t, encode_prompts(sd, texts)).double()

    anchors = predict("a judge", "a chef", "a photo of a nurse")
    loss = lambda: (weight * (anchors - predict(*(pair.prompt for pair in asking))).square().mean((1, 2, 3))).mean()
    assert losses.sum().item() / 3 == pytest.approx(loss().item(), rel=1e-4)
    parameters, h, values = [*network.parameters()], 1e-3, []
    directions = [parameter.grad / parameter.grad.norm() for parameter in parameters]
    for change in h, -2 * h:
        for parameter, direction in zip(parameters, directions):
            parameter.data += change * direction
        values.append(loss())
    slope = sum((parameter.grad * direction).sum().item() for parameter, direction in zip(parameters, directions))
    assert slope == pytest.approx(((values[0] - values[1]) / (2 * h)).item(), rel=1e-2)


def test_safetext_by_hand(sd, dataset):
    before = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 2.0]]])
    embeds = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]], [[0.0, -5.0]]])
    L_u, L_e = finetuning.safetext_losses(embeds, before, torch.tensor([False, True, True]))
    assert L_u.item() == 5 and L_e.item() == pytest.approx(-(0.5**0.5 + 1) / 2)
    assert [loss.item() for loss in finetuning.safetext_losses(before, before, torch.tensor([False] * 3))] == [0, 0]
    pairs = pairs_asking(sd, dataset, "a bloody judge", "a tall judge")
    loss, network, _ = step(sd, finetuning.add_safetext, "text encoder", pairs, SimpleNamespace(lam=3.0))
    assert loss.tolist() == pytest.approx([3, 3])  # λ times cosine 1; the gradient of a distance of 0 is no NaN:
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("method", TRAINED)
def test_only_a_copy_is_trained(sd, dataset, method):
    part, add = TRAINED[method]
    networks = {name: getattr(sd, name) for name in ("unet", "text_encoder", "vae")}
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    s = SimpleNamespace(**vars(settings(batch=8, micro_batch=8)), lam=10.0)
    network, model, value_encoder = trainable(sd, part)
    start, optimizer = copy.deepcopy(network.state_dict()), train.make_optimizer(network)
    add = partial(add, sd, model, value_encoder, schedule=Schedule(sd.scheduler), s=s)
    for i in range(2):
        train.take_step(i, network, optimizer, add, dataset, range(1000), s)
    for name, frozen in networks.items():
        assert not changed(frozen.state_dict(), before[name])
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert len(changed(network.state_dict(), start)) > 0.9 * len(start)
    if part == "keys and values":
        assert only_keys_and_values(changed(model.unet.state_dict(), before["unet"]))


def changed(tensors, others):
    return {name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])}


def only_keys_and_values(names):
    return names and all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in names)


# ── Closed form, guidance, prompts ───────────────────────────────────────────────────────────────────────────────────

def test_uce_is_the_least_squares_solution(sd):
    edits, preserved, lam = [("a doctor", ["a woman doctor", "a man doctor"], 2.0)], ["a nurse"], 0.3
    c, target = uce.token_targets(sd, edits)
    p = encode_prompts(sd, preserved).double()[0]
    eye = math.sqrt(lam) * torch.eye(c.shape[1], dtype=torch.double)
    edited = uce.edit(sd, edits, preserved, lam)
    for layer, new in zip(uce.keys_and_values(sd.unet), uce.keys_and_values(edited)):
        W, ours = layer.weight.double(), new.weight.double()
        A, B = torch.cat([c, p, eye]), torch.cat([target @ W.T, p @ W.T, eye @ W.T])
        torch.testing.assert_close(ours, torch.linalg.lstsq(A, B).solution.T, rtol=1e-4, atol=1e-6)
    assert only_keys_and_values(changed(edited.state_dict(), sd.unet.state_dict()))


def test_uce_matches_tokens_across_an_inserted_word():
    old, new = torch.tensor([0, 5, 6, 9, 9, 9]), torch.tensor([0, 5, 7, 6, 9, 9])
    assert uce.matching_rows(old, new, 9).tolist() == [0, 1, 3, 4, 5, 5]
    assert uce.matching_rows(new, old, 9).tolist() == [0, 1, 1, 2, 3, 4]
    edits, preserved = uce.texts(2.0)
    assert ("a portrait of a bloody artist", ["a portrait of an artist"], 1.0) in edits
    assert "" in preserved and not {text for text, _, _ in edits} & {*preserved}


# A step by hand: at first the warm-up, of which the momentum alone remains.
GUIDANCE = dict(guidance=2.0, warmup=1, momentum_scale=0.5, beta=0.25)


def test_a_step_of_safety_guidance_by_hand():
    uncond, concept, cond = torch.zeros(3), torch.ones(3), torch.tensor([0.95, 0.5, 2.0])
    # weights min(1, 10 · |−0.05|), min(1, 10 · |−0.5|), and 0, where the prompt's noise is not below the concept's
    safety, guide = torch.tensor([0.5, 1.0, 0.0]), partial(guidance.safety_guidance, uncond, concept, cond, scale=10.0,
                                                           threshold=0.0, **GUIDANCE)
    for step, momentum, expected in (0, 0.0, 2 * cond), (1, 0.75 * safety, 2 * (cond - safety - 0.375 * safety)):
        noise, after = guide(momentum=momentum, step=step)
        torch.testing.assert_close(noise, expected)
        torch.testing.assert_close(after, 0.25 * momentum + 0.75 * (safety + 0.5 * momentum))


def test_a_step_of_fair_guidance_by_hand():
    row = lambda *values: torch.tensor(values)[None, None, None, :]
    uncond, cond, wanted, unwanted = row(1.0, 1.0, 1.0), row(2.0, 1.0, 1.0), row(1.1, 3.0, -2.0), row(5.0, 1.0, 2.0)
    # ψ 0.1, 2, −3 and −4, 0, −1: the median of |ψ| keeps 2 and −3, −4 and −1
    edit, plain = 3 * row(-4.0, 2.0, -3.0 - 1.0), row(3.0, 1.0, 1.0)
    guide = partial(guidance.fair_guidance, uncond, wanted, unwanted, cond, scale=3.0, threshold=0.5, **GUIDANCE)
    for step, momentum, expected in (0, 0.0, plain), (1, 0.75 * edit, plain + edit + 0.375 * edit):
        noise, after = guide(momentum=momentum, step=step)
        torch.testing.assert_close(noise, expected)
        torch.testing.assert_close(after, 0.25 * momentum + 0.75 * (edit + 0.5 * momentum))


def test_guided_images_are_those_of_diffusers(tmp_path):
    folder = write_pipeline(tmp_path / "sd", SD1)
    sd, plain_pipe = weights.load(folder), diffusers.StableDiffusionPipeline.from_pretrained(folder)
    parts = {name: getattr(plain_pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    parts |= {"scheduler": diffusers.DDIMScheduler.from_config(SD1), "safety_checker": None, "feature_extractor": None,
              "requires_safety_checker": False}
    settings, text, seeds = {"steps": 6, "sampler": "ddim", "guidance": 40.0, "batch_size": 2}, "a cat on a mat", [3, 4]

    def expected(kind, **options):
        pipe = kind(**parts)
        pipe.safety_concept = "a dog"  # only one of the pipelines reads it
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options |= {"generator": generators, "num_inference_steps": 6, "guidance_scale": 40.0}
        return pixels(pipe([text] * 2, **options).images)

    def ours(texts, guide, **options):
        guide = partial(guide, guidance=40.0, **options)
        return pixels(guidance.generate_guided(sd, settings, text, seeds, texts, guide))

    plain = ours([], lambda uncond, cond, guidance, **_: (uncond + guidance * (cond - uncond), 0))
    assert abs(plain - expected(diffusers.StableDiffusionPipeline)).max() <= 1
    sld = dict(scale=5000, threshold=0.002, warmup=2, momentum_scale=0.3, beta=0.4)
    names = "sld_guidance_scale", "sld_threshold", "sld_warmup_steps", "sld_momentum_scale", "sld_mom_beta"
    safe = expected(diffusers.StableDiffusionPipelineSafe, **dict(zip(names, sld.values())))
    edit = dict(scale=200.0, threshold=0.8, warmup=2, momentum_scale=0.3, beta=0.6)
    names = "edit_guidance_scale", "edit_threshold", "edit_warmup_steps", "edit_momentum_scale", "edit_mom_beta"
    fair = expected(diffusers.SemanticStableDiffusionPipeline, editing_prompt=["a dog", "a cat"],
                    reverse_editing_direction=[False, True], **dict(zip(names, edit.values())))
    for got, theirs in ((ours(["a dog"], guidance.safety_guidance, **sld), safe),
                        (ours(["a dog", "a cat"], guidance.fair_guidance, **edit), fair)):
        assert (abs(got - theirs) > 1).mean() < 0.02 and abs(got - plain).max() > 10


def test_fair_diffusion_edits_towards_each_other_class(monkeypatch):
    calls = []
    monkeypatch.setattr(guidance, "generate_guided", lambda sd, settings, prompt, seeds, texts, guide: calls.append(
        (seeds, texts)) or [*seeds])
    nurse = comparison.Prompt("a nurse", "nurse", (RACE,))
    assert guidance.fair_diffusion(None, {"guidance": 1.0}, nurse, [5, 6, 7, 8, 9]) == [5, 6, 7, 8, 9]
    assert [seeds for seeds, _ in calls] == [[5, 9], [6], [7], [8]]
    assert calls[0][1] == ["a portrait of a pale-skinned person", "a portrait of a light-skinned person"]
    assert len({texts[0] for _, texts in calls}) == 4


def test_prompts_have_a_bias_principle_in_half_of_the_images_and_a_second_one_in_half_of_each_half(monkeypatch):
    calls = []

    def generate(sd, prompt, negative, principles, value_encoder, seeds, **settings):
        calls.append((prompt, negative, list(seeds)))
        yield from reversed([(row, seed, ()) for row, seed in enumerate(seeds)])

    monkeypatch.setattr(evaluate, "generate", generate)
    nurse = comparison.Prompt("a nurse", "nurse", (BLOODY, GENDER, RACE))
    assert evaluate.negative_prompt(None, {}, nurse, range(10, 14)) == [10, 11, 12, 13]  # in the order of the seeds
    blood, woman = "bloody, covered in blood, with blood on the face", "woman, who is a woman"
    light = "light-skinned, with light skin, light skin"
    assert calls == [("a nurse", f"{blood}, {woman}, {light}", [10]), ("a nurse", f"{blood}, {light}", [11]),
                     ("a nurse", f"{blood}, {woman}", [12]), ("a nurse", blood, [13])]
    calls.clear()
    assert evaluate.principle_in_prompt(None, {}, nurse, range(2)) == [0, 1]
    assert calls == [(f"a nurse, {BLOODY}, {GENDER}, {RACE}", "", [0]), (f"a nurse, {BLOODY}", "", [1])]
    calls.clear()
    assert evaluate.principle_in_prompt(None, {}, nurse, range(2), fraction=1) == [0, 1]
    assert calls == [(f"a nurse, {BLOODY}, {GENDER}, {RACE}", "", [0, 1])]


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


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_measure_by_hand():
    """The gray level of an image decides its classes: 0 of the base model, seed + 1 of the method."""

    class LevelClassifier:
        def classify(self, images):
            level = torch.tensor([image.getpixel((0, 0))[0] for image in images])
            return {"profession": level * 0, "gender": level % 2, "skin": level * 0, "bloody": (level < 4) * 0.9,
                    "zombie": level * 0.0, "smoking": level * 0.0}

    class BrightDetector:
        def is_damaged(self, images):
            return np.array([image.getpixel((0, 0))[0] > 3 for image in images])

    asked = []

    def base(prompt, seeds):
        asked.append(prompt.text)
        return uniform_images(seeds, 10 * (seeds[0] >= twins.OTHER_NOISE))

    method = lambda prompt, seeds: uniform_images([seed + 1 for seed in seeds])
    prompts = comparison.PromptSet("a photo of ", ("doctor", "judge"), 0)
    point = comparison.measure(LevelClassifier(), BrightDetector(), method, base, prompts, n=2)
    intervals = point.pop("intervals")
    # seeds 0 and 1 of doctors, 2 and 3 of judges; for bias 0 and 2 are the method's
    assert point == pytest.approx({
        "gender D1": 0, "skin D2": 100 * math.sqrt(0.8), "bloody R": 75, "zombie R": 0, "profession": 50,
        "damaged": 100,  # of the two images that are not bloody
        "bias distance": (1 + 3) / 20, "toxicity distance": (1 + 2 + 3 + 4) / 40}, abs=1e-3)
    assert {*intervals} == {*comparison.HARMS} and intervals["bloody R"][0] < 75 < intervals["bloody R"][1]
    assert {*asked} == {f"a photo of a {words}{profession}" for words in ("", "man ", "pale-skinned ")
                        for profession in ("doctor", "judge")}

    # harm: each metric in percent of the base model's; one that is 0 there does not count
    base = {"gender D1": 50, "skin D2": 80, "bloody R": 100, "zombie R": 0}
    assert comparison.harm(base, base) == 100
    assert comparison.harm({"gender D1": 25, "skin D2": 20, "bloody R": 100, "zombie R": 3}, base) == 175 / 3
    assert comparison.harm({"gender D1": 25, "skin D2": 20}, base, ["bias"]) == 37.5


def fake_curve(harms, correct=100.0):
    curve = [{"step": 50 * (i + 1), "seconds": 10.0 * (i + 1), **dict.fromkeys(comparison.HARMS, harm),
              "profession": correct, "damaged": 0.0, "bias distance": 0.1 * i, "toxicity distance": 0.2 * i}
             for i, harm in enumerate(harms)]
    for point in curve:
        point["intervals"] = {name: [point[name] / 2, point[name]] for name in comparison.HARMS}
    return curve


def fake_results():
    base = fake_curve([100])[0] | {"step": 0}
    run = lambda *curves, parameters=1000, **settings: {"settings": settings, "curves": [*curves],
                                                        "parameters": parameters, "seconds added": 0.5}
    tuning = [{"method": method, "settings": settings, "point": fake_curve([harm])[0]}
              for method, settings, harm in ((comparison.BASE, {}, 100), ("UCE", {"lam": 2}, 40))]
    return {"about": {"model": "x", "per_prompt": 8}, "base": base, "tuning": tuning, "methods": {
        "LiVO": run(fake_curve([30, 6]), fake_curve([34, 8])), "BT": run(fake_curve([9, 50])),
        "SafeText": run(fake_curve([40, 5, 2], 90), lam=3),
        "UCE": run(fake_curve([20]), parameters=0, lam=2)}}


def test_best_settings_and_the_step_where_a_tenth_is_left():
    base, floor = fake_curve([100])[0], dict.fromkeys(comparison.HARMS, 0.0)

    def at(curve, floor=floor):
        point, kept = comparison.reached(curve, "bias", base, floor)
        return point and point["step"], kept

    assert at(fake_curve([30, 9, 8, 5])) == (100, True)
    assert at(fake_curve([30, 9, 50, 8])) == (100, False)  # 50 came after 9
    assert at(fake_curve([60, 50, 9]), floor | {"skin D2": 90}) == (100, True)  # 50 is less than 45 + 5.5
    assert at(fake_curve([50])) == at(fake_curve([5], correct=94.0)) == (None, False)
    points = [fake_curve([20])[0], fake_curve([0], correct=90.0)[0], fake_curve([20.3])[0] | {"bias distance": -1}]
    ranks = [comparison.rank("LiVO", point, base) for point in points]
    assert sorted(range(3), key=ranks.__getitem__) == [2, 0, 1]  # equal harm, nearer; unrecognizable people last
    mean = comparison.mean_curve([fake_curve([30, 6]), fake_curve([34, 8, 1])])
    assert [(point["step"], point["bloody R"]) for point in mean] == [(50, 32), (100, 7)]


def cells(table):
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_tables_in_markdown():
    results, speed, tuning = map(cells, comparison.tables(fake_results()).split("\n\n"))
    assert results["LiVO"][0] == "7.0 [6.0, 8.0]" and results["LiVO"][-1] == "0.500"
    assert results["UCE"][2] == "20.0 [10.0, 20.0]" and results["least possible"][:2] == ["0.0", "33.5"]
    assert speed["LiVO"][1:] == ["1,000", "100, 20 s", "100, 20 s", "100, 20 s"] and "UCE" not in speed
    assert speed["BT"][2:] == ["50, 10 s, lost later"] * 2 + ["100, 20 s"]
    assert speed["SafeText"] == ["lam 3", "1,000", "", "not reached", "150, 30 s"]  # too few professions are correct
    assert tuning["UCE"][:3] == ["lam 2", "40", "100"]


@pytest.mark.skipif(not evaluate.TRAINED.exists(), reason="no assets/baselines.json: the baselines were not run")
def test_shipped_results_are_of_the_shipped_model_and_its_best_settings(shipped):
    results = json.loads(evaluate.TRAINED.read_text())
    assert results["about"]["model"].startswith(evaluate.fingerprint(shipped[0]))
    assert {*results["methods"]} == {*baselines.SWEEP}
    (base,) = [row["point"] for row in results["tuning"] if row["method"] == comparison.BASE]
    for method, found in results["methods"].items():
        rows = [row for row in results["tuning"] if row["method"] == method]
        assert len(found["curves"]) == (len(baselines.SEEDS) if method in TRAINED else 1)
        assert found["settings"] in baselines.SWEEP[method]
        if rows:
            best = min(rows, key=lambda row: comparison.rank(method, row["point"], base))
            assert found["settings"] == best["settings"]


def points_of(axes, label):
    """The points of a series, and which are hollow."""
    lines = axes.get_lines()
    i = next(i for i, line in enumerate(lines) if line.get_label() == label)
    assert lines[i + 1].get_markerfacecolor() == "white"
    return lines[i].get_xydata().tolist(), lines[i + 1].get_markevery()


def test_plots_show_the_points(tmp_path):
    figure = plots.convergence(fake_results())
    for axes, steps in zip(figure.axes, ([0, 50, 100], [0, 10, 20]) * 2):
        points, hollow = points_of(axes, "LiVO")
        np.testing.assert_allclose(points, [*zip(steps, [100, 32, 7])])
        assert hollow == []
    assert points_of(figure.axes[2], "SafeText")[1] == [1, 2, 3]
    assert points_of(figure.axes[0], "SafeText")[0] == []  # it aims at toxicity alone
    plots.save(figure, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    bias, toxicity = plots.tradeoff(fake_results()).axes
    np.testing.assert_allclose(points_of(bias, "LiVO")[0], [[0.1, 6], [0.1, 8]])
    np.testing.assert_allclose(points_of(toxicity, "SafeText")[0], [[0.4, 2]])
    assert points_of(toxicity, "SafeText")[1] == [0] and points_of(bias, "SafeText")[0] == []


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


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def small(tiny, root, monkeypatch, classifier):
    """Options of a command with few runs, of few steps and images. Two methods are tuned."""
    monkeypatch.setattr(baselines, "load_classifier", lambda: classifier)
    monkeypatch.setattr(baselines, "load_detector", lambda: Detector().eval())
    monkeypatch.setattr(baselines, "SAMPLING", {"steps": 2, "sampler": "dpm", "guidance": 2.0, "batch_size": 2})
    monkeypatch.setattr(baselines, "MEASURED", (2,))
    for name, prompts in ("TUNING", comparison.TUNING), ("REPORT", comparison.REPORT):
        monkeypatch.setattr(baselines, name, prompts._replace(professions=("doctor",)))
    for name, value in {"batch": 4, "micro_batch": 4, "warmup": 2, "steps": 5}.items():
        monkeypatch.setitem(baselines.PRESET, name, value)
    tried = {"UCE": 2, "SafeText": 2}
    monkeypatch.setattr(baselines, "SWEEP", {method: choices[:tried.get(method, 1)]
                                             for method, choices in baselines.SWEEP.items()})
    return ["--weights", str(tiny), "--data", str(root), "--steps", "3", "--tune-steps", "1", "--per-prompt", "2"]


def test_the_command_runs_and_collects_every_method(small, tmp_path, monkeypatch, capsys):
    options = [*small, "--out", str(tmp_path / "runs")]
    baselines.main([*options, "--list"])
    assert capsys.readouterr().out.count(" min ") == 2 + 4 + 7 * 3 + 5 and not (tmp_path / "runs").exists()
    baselines.main([*options, "--seeds", "0", "1"])
    table = capsys.readouterr().out
    assert all(f"| {method} |" in table for method in baselines.SWEEP)
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")}
    assert len(found) == 1 + 7 * 2 + 5 and len([*(tmp_path / "runs" / "tune").glob("*.json")]) == 5
    assert [point["step"] for point in found["LiVO-seed=0"]["curve"]] == [2, 3]
    assert [point["step"] for point in found["Diffusion-DPO-seed=1"]["curve"]] == [2, 3]
    assert "seconds added" in found["UCE"] and "seconds added" not in found["LiVO-seed=1"]
    assert found["UCE"]["about"]["settings"] in baselines.SWEEP["UCE"]
    assert found["LiVO-seed=0"]["about"]["margins"]["gamma1"] and not found["Diffusion-DPO-seed=0"]["about"]["margins"]

    refused("expected finished runs, got none", baselines.finished, tmp_path, weights.load(options[1]))
    refused("expected a run on this model, got one on another", baselines.finished, tmp_path / "runs",
            weights.load(train.TINY_SD))
    methods = baselines.finished(tmp_path / "runs", weights.load(options[1]))
    assert {*methods} == {*baselines.SWEEP} - {"Fair Diffusion"}
    prompt, images = comparison.Prompt("a bloody judge", None, (BLOODY,)), {}
    for method, images_of in methods.items():
        image, = images_of(prompt, [7])
        images[method] = image.tobytes()
    assert len({*images.values()}) > 8  # after 3 steps of a tiny model some are equal

    monkeypatch.setattr(baselines.Setup, "carry_out", lambda *_: pytest.fail("again"))
    baselines.main([*options, "--seeds", "0", "1"])
    refused("expected a run of .*'steps': 4.* choose another --out", baselines.main, [*options, "--steps", "4"])
    out = tmp_path / "assets" / "baselines.json"
    baselines.main([*options, "--collect", str(out)])
    results = json.loads(out.read_text())
    assert {*results["methods"]} == {*baselines.SWEEP} and len(results["methods"]["SafeText"]["curves"]) == 2
    assert out.with_suffix(".md").read_text() == comparison.tables(results)
    assert all(Image.open(out.with_name(f"{name}.png")).width > 800 for name in ("convergence", "tradeoff"))


def test_processes_share_the_runs_of_a_folder(tmp_path):
    done = []
    setup = SimpleNamespace(args=SimpleNamespace(out=tmp_path), carry_out=lambda this: done.append(this))
    first, second, *_ = (this for this in baselines.plan(tmp_path, ["UCE", "SafeText"]) if this.tuning)
    with locked(first.folder):  # by another process
        assert not baselines.attempt(first, setup) and baselines.attempt(second, setup)
    assert done == [second] and baselines.attempt(first, setup)
    waiting = [this for this in baselines.plan(tmp_path, ["UCE"]) if this.settings is None]
    assert len(waiting) == 1 and not baselines.attempt(waiting[0], setup)  # UCE is not tuned yet


def test_stopped_and_killed_runs_resume(small, tmp_path, monkeypatch):
    folders = [tmp_path / name / "runs" / "Diffusion-DPO-seed=0" for name in "ab"]
    whole, broken = ([*small, "--only", "Diffusion-DPO", "--seeds", "0", "--out", str(folder.parent)]
                     for folder in folders)
    baselines.main(whole)
    take_step, calls = train.take_step, []

    def dying(number, *args):
        calls.append(number)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the step is finished first
        if len(calls) == 3:
            raise RuntimeError("killed")  # between the checkpoint of step 2 and the end
        return take_step(number, *args)

    monkeypatch.setattr(train, "take_step", dying)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        baselines.main(broken)
    with pytest.raises(RuntimeError):
        baselines.main(broken)
    # as if killed between writing a curve and its checkpoint: the curve is a point ahead
    ahead = json.loads((folders[1] / "curve.json").read_text())
    ahead["curve"].append(ahead["curve"][-1] | {"step": 3, "profession": -1})
    (folders[1] / "curve.json").write_text(json.dumps(ahead))
    baselines.main(broken)
    assert calls == [0, 1, 2, 2]
    first, second = (json.loads(folder.with_name(folder.name + ".json").read_text())["curve"] for folder in folders)
    assert [point | {"seconds": 0} for point in first] == [point | {"seconds": 0} for point in second]
    ours, other = (torch.load(folder / "checkpoint.pt", weights_only=True)["value_encoder"] for folder in folders)
    assert not changed(ours, other)


@pytest.mark.parametrize("options, message", [
    (["--only", "magic"], "--only: expected one of .*, got 'magic'"),
    (["--per-prompt", "1"], "expected an integer from 2"),
    (["--collect", "all.json"], "expected finished runs, got none"),
    (["--weights", "model"], "toy dataset, of 64 pixels, got 16 pixels")])
def test_errors_of_the_command(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    refused(message, baselines.main, [*options, "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists() and not (folder / "all.json").exists()
