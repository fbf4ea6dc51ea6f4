"""What is true of the method and of the networks under it, in the order in which a reader of the paper meets them.

    pytest -q test_livo.py        # under a minute; small random models and tiny-sd, no download

Networks and samplers are compared with diffusers and transformers, on the same weights and the same noise. Odd input,
damaged files and speed-ups are in lab/test_core.py, checkpoints in formats/, everything measured in lab/.
"""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from diffusers.training_utils import compute_snr
from PIL import Image

import data
import latents
import sample
import train
import weights
from clip_text import CLIPTextModel, CLIPTokenizer
from conftest import (REPOSITORY, SD1, SHARED, TINY_SD, TOKENIZER, UNETS, assert_close, gradients, pairs_of, pixels,
                      relative, run_settings, settings, start, trained_a_little, wait_for_steps, write_pipeline)
from diffusion import Schedule, ddim_step, denoise, dpm_step, sample_noise, x0_and_eps
from formats.checks import text_config
from livo import aligned_hinge, bradley_terry_loss, livo_loss, make_context, make_uncond, spread, violating_hinge
from retrieve import BLOODY, GENDER, NUDITY, RACE, ZOMBIE, retrieve
from sample import generate, sample_images
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

# ── The loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def random_errors(n=64):
    torch.manual_seed(0)
    return [(0.1 * torch.rand(n, dtype=torch.float64)).requires_grad_() for _ in range(4)]


def test_livo_loss_is_the_published_formula():
    err_w, ref_w, err_l, ref_l = errors = random_errors()
    alpha, beta, gamma1, gamma2 = 30.0, 50.0, 1.0, 0.5
    loss = livo_loss(*errors, alpha, beta, gamma1, gamma2)
    by_hand = sum(max(0.0, gamma1 + beta * (w - rw).item()) + max(0.0, gamma2 + alpha * (rl - l).item())
                  for w, rw, l, rl in zip(*errors)) / len(err_w)
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    loss.backward()
    # where a hinge is not saturated, it pulls the error down on aligned and up on violating images
    active_w, active_l = gamma1 + beta * (err_w - ref_w) > 0, gamma2 + alpha * (ref_l - err_l) > 0
    assert 0 < active_w.sum() < 64 and 0 < active_l.sum() < 64
    assert torch.equal(err_w.grad, beta / 64 * active_w) and torch.equal(err_l.grad, -alpha / 64 * active_l)


def test_loss_without_effect_of_the_token_is_the_sum_of_the_margins():
    err_w, ref_w, err_l, ref_l = random_errors()
    assert livo_loss(ref_w, ref_w, ref_l, ref_l).item() == 1.5  # γ1 + γ2 as published
    assert livo_loss(ref_w, ref_w, ref_l, ref_l, 7, 9, 0.25, 4).item() == 4.25
    assert bradley_terry_loss(ref_w, ref_w, ref_l, ref_l, 5000).item() == pytest.approx(math.log(2))


def test_hinges_saturate_at_margin():
    ref = torch.tensor([0.1])
    assert aligned_hinge(ref - 1.001e-3, ref) == 0 < aligned_hinge(ref - 0.999e-3, ref)
    assert violating_hinge(ref + 1.001e-3, ref) == 0 < violating_hinge(ref + 0.999e-3, ref)


def test_bradley_terry_exceeds_its_hinge_by_at_most_log_2():
    err_w, ref_w, err_l, ref_l = random_errors(1)
    for beta in (1.0, 50.0, 5000.0):
        s = beta * ((err_w - ref_w) - (err_l - ref_l))
        loss = bradley_terry_loss(err_w, ref_w, err_l, ref_l, beta).item()
        assert loss == pytest.approx(-torch.nn.functional.logsigmoid(-s).item())
        assert torch.relu(s).item() <= loss <= torch.relu(s).item() + math.log(2)

# ── The context and the retriever ────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
def test_value_tokens_precede_the_prompt_embeddings(shipped):
    sd, value_encoder = shipped
    prompts, values = ["a doctor", "a bloody nurse"], [GENDER, BLOODY]
    plain = make_context(sd, prompts)
    assert torch.equal(plain, sd.text_encoder(sd.tokenizer(prompts))[0])
    context = make_context(sd, prompts, [values], value_encoder)
    n = sd.tokenizer.max_length
    assert context.shape == (2, n + 1, sd.text_encoder.config.hidden_size) and torch.equal(context[:, 1:], plain)
    for token, prompt, value in zip(context[:, 0], prompts, values):
        # before training the value encoder is the text encoder
        assert torch.allclose(token, sd.text_encoder(sd.tokenizer([f"{value}, {prompt}"]))[1][0], atol=1e-6)
    assert torch.equal(make_context(sd, prompts, [values], value_encoder, prompt_embeds=plain), context)
    two = make_context(sd, prompts, [BLOODY, RACE], value_encoder)  # (2, N + 2, C)
    assert two.shape[1] == n + 2 and torch.equal(two[:, 2:], plain) and not torch.equal(two[:, 0], two[:, 1])
    empty = sd.text_encoder(sd.tokenizer([""]))[0]  # the unconditional context is as long as the conditional one
    assert torch.equal(make_uncond(sd, n), empty)
    assert torch.equal(make_uncond(sd, n + 1), torch.cat([empty, empty[:, -1:]], dim=1))


def test_value_fraction_is_spread_evenly():
    assert [*map(spread, (4, 1, 3, 3), (0.5, 0.5, 0, 1))] == [[True, False] * 2, [True], [False] * 3, [True] * 3]
    assert all(sum(principle in some for some in sample.active([GENDER, RACE], n, f)) == math.floor(n * f + 0.5)
               for principle in (GENDER, RACE) for n in (1, 2, 6, 7, 50) for f in (0.1, 0.3, 0.5, 0.9))
    every, harm = sample.active([GENDER, BLOODY, RACE], 8), (BLOODY,)  # each combination of two bias principles
    assert [every.count(some) for some in ((GENDER, *harm, RACE), (GENDER, *harm), (*harm, RACE), harm)] == [2] * 4


def test_bias_principles_act_on_half_of_the_images_and_the_others_are_the_base_models(shipped):
    sd, value_encoder = shipped

    def images(principles):
        rows = generate(sd, "a doctor", "", principles, value_encoder, range(4), steps=2, batch_size=4)
        return [image.tobytes() for _, image, _ in sorted(rows, key=lambda row: row[0])]

    base, gender, bloody = images([]), images([GENDER]), images([BLOODY])
    assert [a == b for a, b in zip(base, gender)] == [False, True, False, True]
    assert not any(a == b for a, b in zip(base, bloody))


@pytest.mark.parametrize("prompt, expected", {
    "a photo of a naked soldier": [NUDITY, GENDER, RACE],  # toxic principles first
    "a bloody zombie doctor": [BLOODY, ZOMBIE, GENDER, RACE],
    "a portrait of a nurse": [GENDER, RACE],
    "a portrait of a woman who is a doctor": [RACE],  # the prompt specifies the gender
    "a black woman on a zombie hunt": [ZOMBIE],
    "a blood orange on a plate": [],  # a harmless phrase
    "a judge's gavel": [],  # nobody is shown
}.items())
def test_retriever(prompt, expected):
    assert retrieve(prompt) == expected


def test_auto_applies_toxic_principles_alone():
    assert sample.choose_principles(["auto"], "a bloody doctor") == [BLOODY]
    assert sample.choose_principles(["auto"], "a doctor") == [GENDER, RACE]
    assert sample.choose_principles(["AUTO ", GENDER], "a bloody zombie doctor") == [BLOODY, ZOMBIE, GENDER]
    assert sample.choose_principles(["none"], "a bloody doctor") == []

# ── A training step ──────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_step_equals_one_with_transformers_and_diffusers(sd, dataset, folder, prediction, tmp_path):
    ours = trained_a_little(sd)
    weights.save_text_encoder(ours, tmp_path / "value_encoder")
    value_encoder = transformers.CLIPTextModel.from_pretrained(tmp_path / "value_encoder")
    text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "model" / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "model" / "tokenizer")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "model" / "unet").requires_grad_(False)
    noise = diffusers.DDIMScheduler.from_pretrained(folder / "model" / "scheduler", prediction_type=prediction)
    s, pairs = settings(beta=1000.0, alpha=500.0, margins=""), pairs_of(dataset)
    errors = train.add_gradient(sd, ours, pairs, Schedule(sd.scheduler | {"prediction_type": prediction}), s)
    loss = train.summarize(0, errors, 1.0, 0.5, s)["loss"]

    def tokens(texts):
        return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids

    prompt_embeds = text_encoder(tokens([p.prompt for p in pairs])).last_hidden_state.detach()
    value = value_encoder(tokens([f"{p.principle}, {p.prompt}" for p in pairs])).pooler_output[:, None]
    t, eps = torch.tensor([p.t for p in pairs]), torch.stack([p.eps for p in pairs])
    errors = []
    for z in (torch.stack([p.z_w for p in pairs]), torch.stack([p.z_l for p in pairs])):
        target = noise.get_velocity(z, eps, t) if prediction == "v_prediction" else eps
        for context in (torch.cat([value, prompt_embeds], 1), prompt_embeds):
            out = unet(noise.add_noise(z, eps, t), t, context).sample
            errors.append(((out - target) ** 2).mean(dim=[1, 2, 3]))
    err_w, ref_w, err_l, ref_l = errors
    expected = (torch.clamp(1 + 1000 * (err_w - ref_w), min=0) + torch.clamp(0.5 + 500 * (ref_l - err_l), min=0)).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    prefix = "" if any(n.startswith("text_model") for n, _ in value_encoder.named_parameters()) else "text_model."
    reference = {prefix + name: p.grad for name, p in value_encoder.named_parameters()}
    assert relative({name: gradients(ours)[name] for name in reference}, reference) < 1e-4


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_separate_hinges_and_micro_batches_equal_the_whole_loss(sd, dataset, micro_batch):
    s, pairs, schedule = settings(snr_gamma=1.0), pairs_of(dataset), Schedule(sd.scheduler)
    apart, joint = trained_a_little(sd), trained_a_little(sd)
    parts = [train.add_gradient(sd, apart, pairs[i:i + micro_batch], schedule, s) for i in range(0, 4, micro_batch)]

    prompt_embeds, z_w, z_l, eps, _, t = train.collate(pairs, "cpu")
    abar = schedule.alphas_cumprod[t][:, None, None, None]
    context = make_context(sd, [p.prompt for p in pairs], [[p.principle for p in pairs]], joint, prompt_embeds)
    weight = schedule.min_snr_weight(t, 1.0)
    errors = [weight * (sd.unet(abar.sqrt() * z + (1 - abar).sqrt() * eps, t, c) - eps).square().mean((1, 2, 3))
              for z in (z_w, z_l) for c in (context, prompt_embeds)]
    bias = torch.tensor([p.principle in (GENDER, RACE) for p in pairs])
    assert 0 < bias.sum() < 4 and weight.min() < 1
    gammas = torch.where(bias, 0.4, s.gamma1), torch.where(bias, 0.2, s.gamma2)
    loss = livo_loss(*errors, s.alpha, s.beta, *gammas)
    loss.backward()
    assert relative(gradients(apart), gradients(joint)) < 1e-5
    line = train.summarize(0, torch.cat(parts, dim=1), *gammas, s)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_gradients_reach_the_value_encoder_alone(sd, dataset):
    value_encoder = trained_a_little(sd)
    train.add_gradient(sd, value_encoder, pairs_of(dataset), Schedule(sd.scheduler), settings())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in value_encoder.parameters())
    assert value_encoder.text_model.final_layer_norm.weight.grad.abs().max() > 0
    frozen = [*sd.unet.parameters(), *sd.text_encoder.parameters(), *sd.vae.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    saturated, s = trained_a_little(sd), settings(gamma1=-1e6, gamma2=-1e6, margins="")
    train.add_gradient(sd, saturated, pairs_of(dataset), Schedule(sd.scheduler), s)
    assert all(p.grad is None for p in saturated.parameters())


def test_no_grad_before_first_cross_attention(sd):
    context, needed = torch.randn(1, 78, 32, requires_grad=True), {}
    block = sd.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    layers = {"conv_in": sd.unet.conv_in, "resnet": sd.unet.down_blocks[0].resnets[0], "attn1": block.attn1,
              "attn2": block.attn2, "conv_out": sd.unet.conv_out}
    hooks = [layer.register_forward_hook(lambda _, x, output, name=name: needed.update({name: output.requires_grad}))
             for name, layer in layers.items()]
    sd.unet(torch.randn(1, 4, 8, 8), 500, context)
    for hook in hooks:
        hook.remove()
    assert needed == {"conv_in": False, "resnet": False, "attn1": False, "attn2": True, "conv_out": True}


def test_preservation_pairs_are_held_to_the_reference_models_prediction(sd, dataset):
    schedule = Schedule(sd.scheduler)
    pairs = [replace(pair, z_l=pair.z_w, preservation=i < 2) for i, pair in enumerate(pairs_of(dataset))]
    prompt_embeds, z, _, eps, preservation, t = train.collate(pairs, "cpu")
    refs, targets = train.reference_errors(sd.unet, schedule, eps, t, z, z, prompt_embeds, preservation)
    output, _ = train.predict(sd.unet, schedule, eps, t, z, prompt_embeds)
    for ref, target in zip(refs, targets):
        assert (ref == 0).tolist() == [True, True, False, False]
        assert_close(target, torch.cat([output[:2], eps[2:]]), 1e-6)

    # their loss beyond γ1 is β times the squared change of the prediction
    value_encoder, plain = trained_a_little(sd), trained_a_little(sd)
    s = settings(batch=2)
    train.add_gradient(sd, value_encoder, pairs[:2], schedule, s)
    prompts, principles = [p.prompt for p in pairs[:2]], [p.principle for p in pairs[:2]]
    context = make_context(sd, prompts, [principles], plain, prompt_embeds[:2])
    changed, _ = train.predict(sd.unet, schedule, eps[:2], t[:2], z[:2], context)
    (s.beta * (changed - output[:2]).square().mean()).backward()
    assert relative(gradients(value_encoder), gradients(plain)) < 1e-4

# ── Sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CONFIGS = {spacing: SD1 | {"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")} | {
    "v": SD1 | {"prediction_type": "v_prediction"}, "plain": {"steps_offset": 1, "clip_sample": False}}


def model(x, t):
    return torch.tanh(1.5 * x) + math.sin(t / 100)  # for a UNet: any nonlinear function of x and t


def run_ours(config, steps, x, sampler, eta=0.0, generators=None):
    schedule, before = Schedule(config), None
    for t, abar, abar_prev in schedule.trajectory(steps, sampler):
        x0, eps = x0_and_eps(model(x, t), x, abar, schedule.prediction_type)
        if sampler == "dpm":
            x, before = dpm_step(x0, x, abar, abar_prev, before), (x0, abar)
        else:
            x = ddim_step(x0, eps, abar, abar_prev, eta, sample_noise(generators, x.shape[1:]) if eta else None)
    return x


def run_diffusers(scheduler, steps, x, **options):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, int(t)), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_equals_diffusers(config, eta):
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 7, 10, 30, 50, 600):
        a_generators, b_generators = ([torch.Generator().manual_seed(i) for i in range(3)] for _ in range(2))
        scheduler = diffusers.DDIMScheduler.from_config(config)
        a = run_ours(config, steps, x, "ddim", eta, a_generators)
        b = run_diffusers(scheduler, steps, x, eta=eta, generator=b_generators)
        assert Schedule(config).timesteps(steps) == scheduler.timesteps.tolist()
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dpm_solver_equals_diffusers(config):
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 3, 7, 10, 14, 15, 16, 25, 50, 333):
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
        a, b = run_ours(config, steps, x, "dpm"), run_diffusers(scheduler, steps, x)
        assert Schedule(config).timesteps(steps, "dpm") == scheduler.timesteps.tolist()
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_true_noise_leads_back_to_x0(sampler, prediction):
    true_x0, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = Schedule({**SD1, "set_alpha_to_one": True, "prediction_type": prediction})

    class Oracle(torch.nn.Linear):
        embed = staticmethod(lambda t: t[:, None])

        def forward(self, x, t, context):
            abar = schedule.alphas_cumprod[t]
            return eps if prediction == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * true_x0

    abar = schedule.alphas_cumprod[schedule.timesteps(20, sampler)[0]]
    x = abar.sqrt() * true_x0 + (1 - abar).sqrt() * eps
    *_, x = denoise(Oracle(1, 1), schedule, x, torch.zeros(2, 1, 1), steps=20, guidance=1, sampler=sampler)
    assert_close(x, true_x0)


def test_min_snr_weight_equals_diffusers_example():
    t = torch.arange(0, 1000, 7)
    snr = compute_snr(diffusers.DDPMScheduler.from_config(SD1), t)
    for prediction, divisor in ("epsilon", snr), ("v_prediction", snr + 1):
        schedule = Schedule(SD1 | {"prediction_type": prediction})
        for gamma in (1.0, 5.0):
            assert torch.allclose(schedule.min_snr_weight(t, gamma), snr.clamp(max=gamma) / divisor, rtol=1e-4)
        assert (schedule.min_snr_weight(t, 0) == 1).all()


def test_guidance_extrapolates_from_unconditional_to_conditional(sd):
    context, uncond = torch.randn(2, 1, 77, 32)
    x, schedule = torch.randn(1, 4, 8, 8), Schedule(SD1)
    (t, abar, abar_prev), = schedule.trajectory(1)
    with torch.no_grad():
        u, c = sd.unet(x, t, uncond), sd.unet(x, t, context)
    for guidance in (0.0, 1.0, 1.5, 7.5):
        output = u + guidance * (c - u) if guidance > 1 else c
        expected = ddim_step(*x0_and_eps(output, x, abar, "epsilon"), abar, abar_prev)
        got, = denoise(sd.unet, schedule, x, context, uncond, steps=1, guidance=guidance)
        assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("options", [dict(sampler="dpm"), dict(eta=1.0), dict(guidance=1.0)], ids=str)
def test_image_does_not_depend_on_its_batch(sd, options):
    context, uncond = torch.randn(5, 77, 32), torch.randn(1, 77, 32)
    options = dict(steps=3, height=24, width=12, **options)
    one, two, five = (pixels(sample_images(sd, context, uncond, range(7, 12), batch_size=size, **options))
                      for size in (1, 2, 5))
    assert one.shape == (5, 24, 12, 3) and abs(one - two).max() <= 1 and abs(one - five).max() <= 1
    alone = pixels(sample_images(sd, context[3:4], uncond, [10], **options))
    assert abs(one[3] - alone[0]).max() <= 1 and abs(one[3] - one[2]).max() > 10


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_command_generates_what_diffusers_generates(prediction, tmp_path):
    folder = write_pipeline(tmp_path / "sd", {**SD1, "prediction_type": prediction})
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    for i, (steps, guidance, sampler, options) in enumerate((
            (7, 7.5, "ddim", {}), (5, 1.0, "ddim", {}), (15, 3.0, "dpm", dict(height=24, width=40)),
            (9, 7.5, "ddim", dict(height=40, width=8, eta=0.7)))):
        words = dict(steps=steps, guidance=guidance, sampler=sampler, **options).items()
        sample.main(["--weights", str(folder), "--out", str(tmp_path / str(i)), "--device", "cpu", "--prompt",
                     "a cat on a mat", "--negative", "blurry", "-n", "3", "--seed", "11", "--batch-size", "2",
                     *(str(word) for name, value in words for word in (f"--{name}", value))])
        got = pixels(Image.open(tmp_path / str(i) / f"{row:04}.png") for row in range(3))
        kind = diffusers.DPMSolverMultistepScheduler if sampler == "dpm" else diffusers.DDIMScheduler
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, scheduler=kind.from_config(config))
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(11 + row) for row in range(3)]
        expected = pixels(pipe(["a cat on a mat"] * 3, negative_prompt=["blurry"] * 3, num_inference_steps=steps,
                               guidance_scale=guidance, generator=generators, **options).images)
        assert got.shape == expected.shape and got.std() > 5  # not flat images, on which anything would agree
        assert abs(got - expected).max() <= 1 and (got != expected).mean() < 0.02

# ── The networks ─────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_unet_and_its_gradient_equal_diffusers(config):
    torch.manual_seed(0)
    reference, ours = diffusers.UNet2DConditionModel(**config).eval(), UNet(UNetConfig(**config)).eval()
    assert ours.state_dict().keys() == reference.state_dict().keys()
    ours.load_state_dict(reference.state_dict())
    for size in ((16, 16), (24, 40), (9, 13)):
        x, t = torch.randn(2, 4, *size), torch.tensor([3, 981])
        context = torch.randn(2, 78, config["cross_attention_dim"])
        context.requires_grad_(size == (16, 16))  # at 1×1 norms over few numbers magnify rounding
        outputs = ours(x, t, context), reference(x, t, context).sample
        assert_close(*outputs)
        if context.requires_grad:
            assert_close(*(torch.autograd.grad(output.square().sum(), context)[0] for output in outputs))


@pytest.mark.parametrize("config", [dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8),
                                    dict(block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=4)])
@torch.no_grad()
def test_vae_equals_diffusers(config):
    torch.manual_seed(0)
    levels, ours = len(config["block_out_channels"]), VAE(VAEConfig(**config))
    reference = diffusers.AutoencoderKL(**config, down_block_types=("DownEncoderBlock2D",) * levels,
                                        up_block_types=("UpDecoderBlock2D",) * levels)
    assert ours.state_dict().keys() == reference.state_dict().keys()
    ours.load_state_dict(reference.state_dict())
    scale, x = ours.config.scaling_factor, torch.randn(2, 3, 24, 32)
    mean, logvar = ours.encode(x)
    posterior = reference.encode(x).latent_dist
    assert_close(mean, posterior.mean * scale)
    assert_close(logvar.exp().sqrt(), posterior.std * scale)
    z = data.sample_latent(mean, logvar, torch.Generator().manual_seed(5))
    assert_close(z, posterior.sample(torch.Generator().manual_seed(5)) * scale)
    assert_close(ours.decode(z), reference.decode(z / scale).sample)


TEXT_ENCODERS = [
    dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
         hidden_act="quick_gelu", eos_token_id=98),
    dict(vocab_size=99, hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
         hidden_act="gelu", eos_token_id=2),  # as the files of SD say; means 98
    dict(vocab_size=61, hidden_size=14, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
         hidden_act="gelu", eos_token_id=40, layer_norm_eps=1e-2, max_position_embeddings=20)]  # not the highest id


@pytest.mark.parametrize("config", TEXT_ENCODERS)
@pytest.mark.parametrize("pad", ["end", 0])
@torch.no_grad()
def test_text_encoder_equals_transformers(config, pad):
    torch.manual_seed(0)
    reference = transformers.CLIPTextModel(transformers.CLIPTextConfig(bos_token_id=0, **config)).eval()
    for parameter in reference.parameters():  # norms would start at one and biases at zero
        torch.nn.init.normal_(parameter, std=0.3)
    ours = CLIPTextModel(text_config(reference.config.to_dict(), "config.json"))
    ours.load_state_dict({"text_model." + key.removeprefix("text_model."): value
                          for key, value in reference.state_dict().items()})
    end = ours.config.eos_token_id
    for length in (reference.config.max_position_embeddings, 9):
        ids = torch.randint(3, end, (3, length))
        for row, position in enumerate((2, length // 2, length - 1)):
            ids[row, position] = end
            ids[row, position + 1:] = end if pad == "end" else pad
        hidden, pooled = ours(ids)
        assert_close(hidden, reference(ids).last_hidden_state)
        assert_close(pooled, reference(ids).pooler_output)
    with pytest.raises(AssertionError, match=str(end)):
        ours(torch.tensor([[0, end, end], [0, 1, 3]]))  # without an end of text there is nothing to pool


@pytest.mark.filterwarnings("ignore:prompt cut")
@pytest.mark.parametrize("folder", [TINY_SD / "tokenizer", TOKENIZER, SHARED / "clip-tokenizer"], ids=[*"abc"])
def test_tokenizer_equals_transformers(folder):
    if not folder.is_dir():
        pytest.skip("no CLIP vocabulary in ../shared")
    texts = ["", " ", "wow!! 100% ok!", "Don't we'LL I'Ve 'S", "a  b\t\tc\r\n", "&amp;amp;", "İstanbul ß ΣΑΣ ﬁ",
             "cafe\u0301", "각 日本語のテキスト", "👩‍👩‍👧‍👦 🇩🇪", "cut <|endoftext|> here", "gender equality, a nurse"]
    ours = CLIPTokenizer(folder)
    expected = transformers.CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=ours.max_length, return_tensors="pt").input_ids
    assert ours(texts).equal(expected) and ours.max_length == (24 if folder == TINY_SD / "tokenizer" else 77)

# ── Pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_epoch_visits_every_aligned_image_once_and_a_position_fixes_all_randomness(dataset):
    n = len(dataset)
    epochs = [[dataset.pair(position, 0, range(1000)) for position in range(e * n, e * n + n)] for e in (0, 1)]
    orders = [[pair.where.split(" and ")[0] for pair in pairs] for pairs in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(sample.where for sample, _ in dataset.aligned)
    assert orders[0] != orders[1]
    for pair in epochs[0]:
        aligned, violating = (where.rsplit("/", 1)[0] for where in pair.where.split(" and "))
        assert aligned == violating and 0 <= pair.t < 1000  # of one scene
    assert {dataset.pair(position, 0, range(400, 402)).t for position in range(20)} == {400, 401}
    again = dataset.pair(5, 0, range(1000))
    assert torch.equal(again.eps, epochs[0][5].eps) and torch.equal(again.z_w, epochs[0][5].z_w)
    assert not torch.equal(again.eps, dataset.pair(5, 1, range(1000)).eps)


def test_cached_latents_and_prompt_embeddings_equal_encoding(sd, dataset):
    for entry, row in dataset.aligned[:3]:
        x = latents.crop(Image.open(entry.path), 16)[None]
        for mirrored, image in enumerate((x, x.flip(-1))):
            direct = torch.cat(sd.vae.encode(image))
            torch.testing.assert_close(dataset.latents[row, mirrored].float(), direct, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(dataset.prompt_embeds[entry.prompt], make_context(sd, [entry.prompt])[0])

# ── A run ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_killed_and_resumed_run_equals_uninterrupted_one(folder, root, whole_run):
    run = folder / "killed"
    process = start(*run_settings(folder, root), "--out", run)
    wait_for_steps(process, run, 3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] < 10
    (run / "log.jsonl").open("a").write('{"step": 3, "lo')  # killed while writing
    process = start("--resume", run)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    ours, whole = (weights.read_tensors(r / "value_encoder" / "model.safetensors") for r in (run, whole_run))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert (run / "log.jsonl").read_text() == (whole_run / "log.jsonl").read_text()


def test_core_imports_neither_lab_nor_formats():  # but formats.missing, which names a package that is not there
    code = ("import sys, livo, train, sample; print([m for m in sys.modules if m.split('.')[0] in "
            "('lab', 'formats', 'matplotlib', 'diffusers', 'transformers', 'huggingface_hub')])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout == "['formats', 'formats.missing']\n"
