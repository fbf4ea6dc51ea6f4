"""More of what is true of the core: odd input, damaged data, interrupted runs, and speed-ups that change no result."""

import copy
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import warnings
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise, product
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import data
import efficiency
import latents
import livo
import runs
import sample
import train
import weights
from conftest import (FORK, KILLS, SD1, TINY_SD, UNETS, ImageProcessor, assert_close, gradients, pairs_of, pixels,
                      refused, relative, run_settings, run_with_kills, settings, start, trained_a_little,
                      wait_for_steps, write_pipeline)
from diffusion import Schedule, denoise
from efficiency import pick_device
from formats.disk import locked
from formats.messages import RENAMED
from lab import portraits, toy
from lab.check import check
from livo import ValueEncoder
from retrieve import GENDER, ZOMBIE
from sample import generate, grid, sample_images
from unet import ResnetBlock, SpatialTransformer, UNet, UNetConfig

# ── Sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_step_count_gives_that_many_falling_timesteps(spacing):
    schedule = Schedule({**SD1, "timestep_spacing": spacing})
    for steps, sampler in product(range(1, 999), ("ddim", "dpm")):
        t = schedule.timesteps(steps, sampler)
        assert len(t) == steps and all(a > b for a, b in pairwise(t)) and 0 <= t[-1] and t[0] < 1000


@pytest.mark.parametrize("key, value", [("rescale_betas_zero_snr", True), ("thresholding", True),
                                        ("use_karras_sigmas", True), ("algorithm_type", "sde-dpmsolver++")])
def test_unsupported_schedules_raise(key, value):
    refused(f"expected {key} .*, got {re.escape(str(value))}$",
            lambda: Schedule({**SD1, key: value}).trajectory(10, "dpm"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("sd") / "sd", SD1)


def run_sample(written, out, *options):
    options = "--weights", written, "--out", out, "--device", "cpu", "--dtype", "fp32", *options
    sample.main([*map(str, options)])
    return pixels(Image.open(path) for path in sorted(out.glob("0*.png")))


def test_pngs_carry_their_settings(written, tmp_path):
    out = tmp_path / "a" / "b"
    first = run_sample(written, out, "--prompt", "naïve cät", "-n", 2, "--seed", 41, "--steps", 2, "--height", 24)
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "0001.png", "grid.png"]
    text = Image.open(out / "0001.png").text
    expected = dict(prompt="naïve cät", negative="", seed="42", steps="2", guidance="7.5", sampler="ddim",
                    eta="0.0", height="24", width="64")
    assert (expected | {"weights": str(written)}).items() <= text.items()
    again = run_sample(written, tmp_path / "again", *(word for key in expected for word in (f"--{key}", text[key])))
    assert abs(again[0] - first[1]).max() <= 1


def test_principles_of_bias_end_in_equality():
    texts = "gender equality", " Racial Equality ", "age equality.", "age equality. ", "equality\t"
    assert all(map(livo.is_bias, texts))
    assert not any(map(livo.is_bias, ("bloody considered inappropriate", "equality considered inappropriate", "")))


def test_unwritable_output_is_found_before_the_work(written, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "sample_images", None)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused("to write to, got", run_sample, written, out, "--prompt", "cat")
    assert (tmp_path / "file").read_text() == "mine"


def test_nan_raises_instead_of_a_black_image(sd):
    sd = copy.deepcopy(sd)
    sd.unet.conv_out.bias.data[0] = float("nan")
    refused("NaN", lambda: list(sample_images(sd, torch.zeros(1, 77, 32), torch.zeros(1, 77, 32), [0], steps=2)))


def test_principles_and_comparison_of_the_command(tmp_path, capsys):
    folder = tmp_path / "out"
    common = ["--prompt", "a zombie chef", "--steps", "2", "-n", "2", "--out", str(folder)]
    sample.main([*common, "--compare", "--principle", "auto", "--principle", GENDER])
    assert f"{ZOMBIE}, {GENDER}" in capsys.readouterr().out
    assert [Image.open(folder / f"{i:04}.png").text["principle"] for i in (0, 1)] == [f"{ZOMBIE}, {GENDER}", ZOMBIE]
    assert Image.open(folder / "compare.png").size[1] == 2 * (64 + 16)
    for wrong in (["none", GENDER], [" "], [GENDER, ""]):
        refused("--principle: expected auto, none alone, or a text", sample.choose_principles, wrong, "a doctor")


def test_grid_is_a_full_rectangle_where_there_is_one():
    images = [Image.new("RGB", (6, 4), (i, 0, 0)) for i in range(8)]
    assert [grid(images).getpixel((6 * x, 4 * y))[0] for y in range(2) for x in range(4)] == [*range(8)]
    sizes = {n: grid(images[:1] * n).size for n in (1, 2, 4, 5, 6, 8, 12)}
    assert sizes == {1: (6, 4), 2: (12, 4), 4: (12, 8), 5: (18, 8), 6: (18, 8), 8: (24, 8), 12: (24, 12)}


# ── Precision, memory and speed ──────────────────────────────────────────────────────────────────────────────────────

def test_compiled_unet_generates_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(UNet, "compile", lambda unet: nn.Module.compile(unet, backend="eager", fullgraph=True))
    options = ["--prompt", "a doctor", "--steps", 3, "--principle", "none"]
    plain, compiled = (run_sample(TINY_SD, tmp_path / name, *options, *more)
                       for name, more in (("plain", []), ("compiled", ["--compile"])))
    assert abs(plain - compiled).max() <= 1


def test_auto_is_bfloat16_where_the_cpu_and_the_model_gain_from_it(monkeypatch):
    assert [pick_device("cpu", name)[1] for name in ("auto", None, "bf16")] == [None, torch.float32, torch.bfloat16]
    for able, wide, expected in [(True, 1000, torch.float32), (False, 1, torch.float32), (True, 1, torch.bfloat16)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        monkeypatch.setattr(efficiency, "WIDE", wide)
        sd = weights.load(TINY_SD, dtype=None)
        assert [next(net.parameters()).dtype for net in (sd.unet, sd.text_encoder, sd.vae)] == [expected] * 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.05), (torch.bfloat16, 2)])  # of 255, on average
def test_channels_last_and_half_precision_generate_about_the_same(shipped, monkeypatch, dtype, tolerance):
    models = [shipped[0]]
    for wide in (1, 1000):
        monkeypatch.setattr(efficiency, "WIDE", wide)
        models.append(weights.load(TINY_SD, dtype=dtype))
        assert models[-1].unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last) == (wide == 1)
    first, last = (latents.fingerprint(model, [], None) for model in models[1:])
    assert first == last  # of a dataset: the layout of the weights in memory is not their content
    full, last, first = (pixels(image for _, image, _ in generate(sd, "a doctor", "", [], None, [0], steps=4))
                         for sd in models)
    assert abs(last - first).mean() < tolerance and abs(first - full).mean() < 4 and full.std() > 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_equals_plain_steps(sd, monkeypatch):
    context, uncond = torch.randn(2, 2, 77, 32, device="cuda")
    unet, x = copy.deepcopy(sd.unet).cuda(), torch.randn(2, 4, 8, 8, device="cuda")
    before = x.clone()
    graphed = [y.clone() for y in denoise(unet, Schedule(SD1), x, context, uncond, steps=5)]
    monkeypatch.setattr("diffusion.with_context", lambda unet, context, x: lambda x, t: unet(x, t, context))
    for ours, plain in zip(graphed, denoise(unet, Schedule(SD1), x, context, uncond, steps=5), strict=True):
        assert_close(ours, plain)
    assert torch.equal(x, before)


def test_cached_depth_skips_the_lower_resolutions_alone(sd):
    context, (x, y) = torch.randn(2, 77, 32), torch.randn(2, 2, 4, 9, 9)
    time_emb, calls = sd.unet.embed(torch.tensor([500])), []
    with torch.no_grad():
        plain = [sd.unet(z, 500, context) for z in (x, y, x)]
        every, second = (efficiency.with_cached_depth(sd.unet, context, n) for n in (1, 2))
        assert all(torch.equal(every(z, time_emb), output) for z, output in zip((x, y, x), plain))
        handle = sd.unet.up_blocks[0].register_forward_hook(lambda *_: calls.append(1))
        outputs = [second(z, time_emb) for z in (x, y, x)]
        handle.remove()
    assert [torch.equal(*both) for both in zip(outputs, plain)] == [True, False, True] and len(calls) == 2
    assert not torch.equal(outputs[1], outputs[0])


def stored(unet, context):
    """-> the output, and the bytes stored for the backward pass, weights aside."""
    weights_of, found = {p.untyped_storage().data_ptr() for p in unet.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights_of:
            found[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)  # x: so that none is freed
        return x

    checkpoint = torch.utils.checkpoint.checkpoint
    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        patch.setattr("efficiency.checkpoint", lambda f, x, **options: checkpoint(f, pack(x), **options))
        output = unet(torch.randn(1, 4, 16, 16), 500, context)
    return output, sum(size for size, _ in found.values())


@pytest.mark.parametrize("trick", ["recompute", "frozen convolution", "frozen convolution, channels last"])
def test_memory_savers_store_less_and_change_nothing(trick, monkeypatch):
    torch.manual_seed(0)
    layout = torch.channels_last if "channels last" in trick else torch.contiguous_format
    unet = UNet(UNetConfig(**UNETS["1.x, two levels"])).eval().requires_grad_(False).to(memory_format=layout)
    context, results = torch.randn(1, 78, 24, requires_grad=True), []
    for _ in range(2):
        torch.manual_seed(1)
        output, size = stored(unet, context)
        results.append((output, torch.autograd.grad(output.square().sum(), context)[0], size))
        if trick == "recompute":
            monkeypatch.setattr(efficiency, "recompute", lambda f, x: f(x))
        else:
            monkeypatch.setattr(efficiency.Conv2d, "forward", nn.Conv2d.forward)
    (output, gradient, less), (plain, plain_gradient, more) = results
    assert_close(output, plain, 1e-6)
    assert_close(gradient, plain_gradient, 1e-5)
    assert less < (0.8 if trick == "recompute" else 0.9) * more


def step(sd, pairs):
    value_encoder = trained_a_little(sd)
    return train.add_gradient(sd, value_encoder, pairs, Schedule(sd.scheduler), settings()), gradients(value_encoder)


def test_checkpointing_gives_the_same_gradient_and_half_precision_about_the_same(sd, dataset, monkeypatch):
    saved, half, pairs = copy.deepcopy(sd), copy.deepcopy(sd), pairs_of(dataset)
    errors, gradient = step(sd, pairs)
    half.unet.bfloat16()
    half.text_encoder.bfloat16()
    errors_half, gradient_half = step(half, [replace(p, prompt_embeds=p.prompt_embeds.bfloat16()) for p in pairs])
    assert errors_half.dtype == torch.float32 and {g.dtype for g in gradient_half.values()} == {torch.float32}
    torch.testing.assert_close(errors_half, errors, rtol=0.01, atol=0)
    assert relative(gradient_half, gradient) < 0.1
    efficiency.checkpoint_layers(saved.unet, (ResnetBlock, SpatialTransformer))
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a random state, which a CUDA graph forbids"))
    assert relative(step(saved, pairs)[1], gradient) < 1e-5


def test_training_in_half_precision_starts_from_the_text_encoder_in_full(folder, root, tmp_path, monkeypatch):
    """Rounded weights would be another start: in bfloat16 nearly all of them change."""
    started = []
    monkeypatch.setattr(train, "carry_out", lambda args, s, folder, sd: started.append(sd))
    train.main(["--out", str(tmp_path / "run"), *run_settings(folder, root), "--dtype", "bf16"])
    stored = weights.load(folder / "model").text_encoder.state_dict()
    encoder = ValueEncoder.from_text_encoder(started[0].text_encoder)
    assert started[0].unet.conv_in.weight.dtype == torch.bfloat16
    assert all(torch.equal(tensor, stored[name]) for name, tensor in encoder.state_dict().items())


def test_final_layer_norm_has_a_learning_rate_of_its_own(sd, dataset):
    s, value_encoder = settings(lr=1e-4, warmup=1, final_ln_lr_scale=5.0), trained_a_little(sd)
    before = {name: p.detach().clone() for name, p in value_encoder.named_parameters()}
    optimizer = train.make_optimizer(value_encoder, s.final_ln_lr_scale)
    add = partial(train.add_gradient, sd, value_encoder, schedule=Schedule(sd.scheduler), s=s)
    train.take_step(0, value_encoder, optimizer, add, dataset, range(1000), s)
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in value_encoder.named_parameters()}
    final = {name for name in moved if "final_layer_norm" in name}  # Adam's first step is the rate
    assert len(final) == 2 and all(4.5 * s.lr < moved[name] < 5.5 * s.lr for name in final)
    assert 0.9 * s.lr < max(moved[name] for name in moved.keys() - final) < 1.1 * s.lr


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def entry(**changes):
    return {"file_name": "a.png", "prompt": "a chef", "value": GENDER, "label": 1} | changes


def write_lines(scene, *lines, good=200):
    """Write a scene of `good` usable lines, every other one aligned, and the given ones."""
    lines = [*(entry(label=i % 2) for i in range(good)), *lines]
    scene.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), "red").save(scene / "a.png")
    (scene / "metadata.jsonl").write_text("".join(
        (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


@pytest.mark.parametrize("line, message", [
    ("{not json", "Expecting"), ("[1]", "expected an object"), (entry(label="1"), "integer as label"),
    (entry(prompt="  "), "text as prompt"), (entry(value=None), "text as value"),
    (entry(file_name="b.png"), "no file b"), (entry(file_name="link.png"), "leaves the dataset folder")])
def test_unusable_line_is_skipped_and_named_here_and_by_check(tmp_path, line, message):
    """More of them are in lab/test_campaign.py."""
    scene = tmp_path / "data" / "0-career" / "chef"
    write_lines(scene, line)
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (scene / "link.png").symlink_to(tmp_path / "outside.png")
    samples, (fault,) = data.read_samples(tmp_path / "data")
    assert len(samples) == 200 and f"{scene / 'metadata.jsonl'}:201: " in fault and message in fault
    assert fault in check(tmp_path / "data")[1]


def test_only_aligned_images_are_usable_in_preservation_scenes(tmp_path):
    write_lines(tmp_path / data.PRESERVATION_TYPE / "s", *[entry()] * 200, entry(label=0), good=0)
    samples, (fault,) = data.read_samples(tmp_path)
    assert len(samples) == 200 and "metadata.jsonl:201: expected only label 1" in fault


@pytest.mark.parametrize("label, message", [
    (None, "broken.png is no readable image"), (1, "its scene has no violating"), (0, "its scene has no aligned")])
def test_broken_images_and_images_without_partners_are_named_skipped_and_counted(sd, tmp_path, label, message):
    root, cache = tmp_path / "data", tmp_path / "cache"
    write_lines(root / "t" / "good")
    portraits.render(portraits.sample_record(0)).save(root / "t" / "good" / "broken.png")
    os.truncate(root / "t" / "good" / "broken.png", 700)

    line = entry(file_name="broken.png") if label is None else entry(label=label)
    add = partial(write_lines, root / "t" / ("good" if label is None else "lonely"), good=200 if label is None else 0)
    add(line)
    for _ in range(2):  # encoding, and from the cache
        with pytest.warns(match=f"metadata.jsonl:(201|1): {message}.*; skipped"):
            assert len(data.PreferenceDataset(root, sd, cache)) == 100
    add(line, line, line)
    with warnings.catch_warnings(action="ignore"):
        refused("at most 1% unusable samples, got 3 of 203", data.PreferenceDataset, root, sd, cache)


def test_aligned_image_meets_every_violating_one_of_its_scene_and_a_preservation_image_itself(sd, dataset, tmp_path):
    image = portraits.render(portraits.sample_record(0))
    toy.write_scene(tmp_path / "data" / "t" / "s", [(image, "a “chef”", "equality", int(i < 2)) for i in range(6)])
    pairs = data.PreferenceDataset(tmp_path / "data", sd, tmp_path / "cache")
    assert len({pairs.pair(position, 0, range(1000)).where for position in range(100)}) == 2 * 4
    sample, _ = pairs.aligned_at(0, 0)
    assert (sample.prompt, sample.value) == ("a “chef”", "equality")
    assert Image.open(sample.path).tobytes() == image.tobytes()  # as written
    position = next(i for i in range(len(dataset)) if data.is_preservation(dataset.aligned_at(i, 0)[0]))
    pair, (sample, _) = dataset.pair(position, 0, range(1000)), dataset.aligned_at(position, 0)
    assert pair.where == f"{sample.where} and {sample.where}" and pair.preservation
    assert 0 < (pair.z_w - pair.z_l).abs().max() < 1 and pair.z_w.std() > 0  # two draws of one distribution


def test_both_images_of_a_pair_are_mirrored_or_neither(dataset, monkeypatch):
    without_noise = dataset.latents.clone()
    without_noise[:, :, 1] = -30  # the log-variance
    monkeypatch.setattr(dataset, "latents", without_noise)
    rows = {sample.where: row for sample, row in chain(dataset.aligned, *dataset.violating.values())}

    def nearest(z, where):  # 0: the latent of the image, 1: that of the mirrored image
        return (dataset.latents[rows[where], :, 0].float() - z).square().mean((1, 2, 3)).argmin().item()

    assert {(nearest(pair.z_w, w), nearest(pair.z_l, l)) for pair in pairs_of(dataset, 20)
            for w, l in [pair.where.split(" and ")]} == {(0, 0), (1, 1)}


def test_cache_key_is_of_the_model_and_of_content(sd, root, dataset, tmp_path):
    samples, root = data.read_samples(root)[0], root.resolve()
    other, short = copy.deepcopy(sd), replace(sd, tokenizer=copy.copy(sd.tokenizer))
    next(other.text_encoder.parameters())[0, 0] += 1
    short.tokenizer.max_length -= 1
    keys = {latents.fingerprint(other, samples, root), latents.fingerprint(short, samples, root),
            latents.fingerprint(sd, [replace(samples[0], prompt="another"), *samples[1:]], root)}
    # a plain copy has other file times, a link another name: neither is encoded again
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    os.symlink(tmp_path / "copy", tmp_path / "link")
    for same in (root, tmp_path / "copy", tmp_path / "link"):
        assert latents.fingerprint(sd, data.read_samples(same)[0], same.resolve()) == dataset.key
    samples = data.read_samples(tmp_path / "copy")[0]
    samples[0].path.write_bytes(samples[1].path.read_bytes())
    keys.add(latents.fingerprint(sd, samples, tmp_path / "copy"))
    assert len(keys) == 4 and dataset.key not in keys


def test_unfinished_files_of_dead_processes_of_this_machine_are_removed(sd, root, dataset, tmp_path):
    process = FORK.Process(target=int)
    process.start()
    process.join()
    dead, living, elsewhere = (tmp_path / f".{dataset.key}.{owner}.tmp" for owner in (
        f"{platform.node()}-{process.pid}", f"{platform.node()}-{os.getppid()}", f"elsewhere-{process.pid}"))
    for folder in (dead, living, elsewhere):
        folder.mkdir()
    again = data.PreferenceDataset(root, sd, tmp_path)
    assert again.key == dataset.key and {*tmp_path.glob(".*")} == {living, elsewhere}
    (tmp_path / again.key / "latents.bin").write_bytes(b"cut")
    with pytest.warns(match="expected a sound cache, got latents.bin: expected .* bytes, got 3; it is made again"):
        made_again = data.PreferenceDataset(root, sd, tmp_path).latents
    torch.testing.assert_close(made_again, dataset.latents, rtol=1e-2, atol=1e-2)  # maybe of another number of threads


def test_crop_equals_that_of_transformers():
    half = [0.5] * 3
    processor = ImageProcessor(size={"shortest_edge": 16}, crop_size=16, resample=Image.Resampling.BILINEAR,
                               image_mean=half, image_std=half)
    for size in ((70, 50), (50, 71), (16, 16), (33, 20)):
        image = Image.effect_noise(size, 90).convert("RGB")
        reference = processor(image, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(latents.crop(image, 16), reference, rtol=0, atol=1e-6)


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def value_encoder_of(run):
    return weights.load_text_encoder(run / "value_encoder").state_dict()


def test_preset_of_the_checkpoint_holds_unless_an_option_is_given(tmp_path):
    _, s, folder = train.parse_args(["--steps", "7", "--out", str(tmp_path / "run")])
    preset = runs.load_preset(train.TINY_SD)
    assert s.data == train.TOY and folder == tmp_path / "run" and preset["steps"] != 7
    assert {name: getattr(s, name) for name in preset} == preset | {"steps": 7}
    for content, message in (("lr = 'fast'", "options of train.py, got: .*--lr"), ("lr = ", "settings in TOML")):
        (tmp_path / "livo.toml").write_text(content)
        refused(f"livo.toml: expected {message}", train.parse_args, ["--weights", str(tmp_path)])


def test_resume_refuses_other_data(whole_run, tmp_path):
    """Damaged checkpoints are in lab/test_campaign.py."""
    run = shutil.copytree(whole_run, tmp_path / "run")
    torch.save(torch.load(run / "checkpoint.pt", weights_only=True) | {"data": "another"}, run / "checkpoint.pt")
    refused("expected the data, VAE, text encoder and dtype that the run began with", train.main,
            ["--resume", str(run), "--steps", "11"])


def test_a_run_in_the_current_folder_uses_the_cache_beside_it(folder, root, tmp_path, monkeypatch):
    """The folder "." has the parent ".", whose lock the run holds: it once waited for itself."""
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(run)
    (tmp_path / "link").symlink_to(run)
    resumed = ["--resume", "."], ["--resume", str(tmp_path / "link")]
    for options in ([*run_settings(folder, root), "--out", "."], *resumed):
        _, _, found = train.parse_args(options)
        assert found == run.resolve() and found.parent == tmp_path.resolve()
        runs.save_settings(run, train.Settings(data=str(root), weights=str(folder / "model")))


def test_init_continues_with_a_trained_value_encoder(folder, root, whole_run):
    initialized = folder / "initialized"
    train.main([*run_settings(folder, root, steps=1, lr=0, init=whole_run), "--out", str(initialized)])
    before, after = value_encoder_of(whole_run), value_encoder_of(initialized)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_signal_writes_a_checkpoint(folder, root):
    run = folder / "stopped"
    process = start(*run_settings(folder, root, steps=10**6, save_every=10**6), "--out", run)
    wait_for_steps(process, run, 3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert step == len(log_of(run)) >= 3 and f"stopped after step {step}" in output and "Traceback" not in output


def test_two_processes_equal_one(folder, root, whole_run):
    run = folder / "two"
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randrange(20_000, 60_000))}
    processes = [start(*run_settings(folder, root, micro_batch=1), "--out", run, RANK=rank, LOCAL_RANK=rank, **env)
                 for rank in "01"]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # Adam turns the rounding of the smallest gradients into full steps
    assert relative(value_encoder_of(run), value_encoder_of(whole_run)) < 1e-4
    for two, one in zip(log_of(run), log_of(whole_run), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_non_finite_error_stops_the_run_and_names_the_pair(sd, dataset, tmp_path, monkeypatch):
    s, pair = settings(), dataset.pair
    train.fit(sd, dataset, replace(s, steps=2), tmp_path)
    before, bad = (tmp_path / "checkpoint.pt").read_bytes(), pair(3 * 4 + 1, s.seed, range(1000))
    monkeypatch.setattr(dataset, "pair", lambda position, *args: replace(
        bad, z_l=bad.z_l * math.nan) if position == 3 * 4 + 1 else pair(position, *args))
    refused(f"step 3.*at {re.escape(bad.where)}$", train.fit, sd, dataset, s, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_thirty_kills_at_random_moments_change_nothing(folder, root, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SAMPLING", {"steps": 1, "guidance": 1, "batch_size": 16})
    options = run_settings(folder, root, steps=24, save_every=3, sample_every=8)

    def train_with_kills(run, kills):
        """Into a folder with a cache of its own: the first kills come while the data are encoded."""
        def arguments():
            return ["--resume", str(run)] if (run / "settings.json").exists() else [*options, "--out", str(run)]

        left = run_with_kills(train.main, arguments, kills, seconds=0.8)
        assert not [*run.parent.rglob(".*")]  # no leftovers
        files = [run / "log.jsonl", run / "value_encoder/model.safetensors", *sorted((run / "samples").iterdir())]
        return left, {file.relative_to(run): file.read_bytes() for file in files}

    _, whole = train_with_kills(tmp_path / "whole" / "run", 0)
    assert len(whole) == 5
    left = KILLS
    while left:
        left, killed = train_with_kills(tmp_path / str(left) / "run", left)
        assert killed == whole


def test_second_run_in_a_folder_is_refused(folder, root, whole_run, tmp_path):
    run, new = shutil.copytree(whole_run, tmp_path / "run"), tmp_path / "new"
    for options in (["--resume", str(run), "--steps", "11"], [*run_settings(folder, root), "--out", str(new)]):
        with locked(run), locked(new):
            refused("expected a run of one process", train.main, options)
    assert not [*new.iterdir()]
    (new / ".settings.json.tmp").touch()  # of a run that was killed while it wrote the first file
    runs.check_new(new)
    (new / "log.jsonl").touch()
    refused("expected a new folder", runs.check_new, new)


def test_log_and_sample_sheet_are_of_pairs_with_a_violating_image(dataset, monkeypatch, tmp_path):
    errors = torch.tensor([[0.3, 0.5], [0.4, 0.0], [0.6, 0.5], [0.4, 0.0]])  # the second pair is for preservation
    line = runs.summarize(0, errors, torch.tensor([1.0, 1.0]), torch.tensor([0.5, -math.inf]), settings())
    assert [line[key] for key in runs.LOGGED] == pytest.approx([0, 0, -0.1, 0.2, 0.4])
    assert line["loss"] == pytest.approx((1 + 100 * 0.5) / 2)
    assert runs.summarize(0, errors[:, 1:], 1.0, -math.inf, settings())["active_w"] == 0  # none of such pairs
    prompts, image = [], (0, Image.new("RGB", (9, 9)), [])
    monkeypatch.setattr(runs, "generate", lambda sd, prompt, *_, **__: prompts.append(prompt) or [image])
    pairs = sorted(dataset.aligned, key=lambda row: not data.is_preservation(row[0]))  # those for preservation first
    runs.save_samples(None, None, SimpleNamespace(aligned=pairs), tmp_path / "sheet.png")
    first = {s.value: s.prompt for s, _ in reversed(pairs) if not data.is_preservation(s)}
    assert prompts[::2] == prompts[1::2] and sorted(prompts[::2]) == sorted(first.values())
    only = [row for row in pairs if data.is_preservation(row[0])]
    runs.save_samples(None, None, SimpleNamespace(aligned=only), tmp_path / "sheet.png")
    assert prompts[-1] == only[0][0].prompt


def test_warning_if_the_margins_are_too_small():
    line = {"active_w": 0.1, "active_l": 0.05, "delta_w": -0.001, "delta_l": 0.001, "ref": 0.08}
    with pytest.warns(match=r"γ1/β = 0.001 .*--gamma1 4e\+01 --gamma2 2e\+01"):
        runs.warn_if_saturated([line] * 50, train.Settings())
    with warnings.catch_warnings(action="error"):
        for fine, s in (({"active_w": 0.5}, {}), ({"delta_l": 0.02}, {}), ({}, {"beta": 0.0}),  # 0: without a hinge
                        ({}, {"margins": "gender equality: 1 1"})):
            runs.warn_if_saturated([line | fine] * 50, train.Settings(**s))


def test_old_names_of_options_are_refused_with_the_new_one():
    for old, new in RENAMED.items():
        refused(f"expected {new}, the new name", train.main, [old, "1"])
        refused(f"expected {new}, the new name", train.main, [f"{old}=1"])
    refused("expected it without --resume", train.main, ["--resume", "a", "--out", "b"])
