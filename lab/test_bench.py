
import json
import os
import shutil
from functools import partial

import torch

import diffusers
import numpy as np
import pytest
import transformers
from PIL import Image

from lab import bench
import sample
import weights
from common import UserError
from unet import UNetConfig
from conftest import TOKENIZER, pixels


# ── bench.py ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def one_process(tiny, monkeypatch):
    """bench.py measures the random model, here, without processes of its own."""
    monkeypatch.setattr(bench, "TINY_SD", tiny)
    monkeypatch.setattr(bench, "apart", bench.measured)
    monkeypatch.setattr(bench, "rate", lambda device, dtype: 1e11)


def test_both_sides_of_the_bench_compute_the_same(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    common = tmp_path / "model", torch.device("cpu"), torch.float32, 64
    images = [side(*common, 2, 3, whole)[1]
              for side in (bench.drawing_ours, bench.drawing_theirs) for whole in (False, True)]
    for theirs in images[1:]:
        assert abs(pixels(images[0]) - pixels(theirs)).max() <= 1
    bench.write_pairs(*common, 2, tmp_path / "pairs.pt")
    sides = [side(*common, 2, 3, tmp_path / "pairs.pt") for side in (bench.training_ours, bench.training_theirs)]
    assert sides[0][1] == pytest.approx(sides[1][1], abs=1e-3)
    assert sides[0][1] != pytest.approx(2 * bench.MARGIN, abs=0.01)  # that of a token without effect


def test_operations_are_those_of_the_full_size_unet():
    giga = partial(bench.unet_operations, UNetConfig(), 64, 1, 77)
    assert giga() / 1e9 == pytest.approx(803, abs=1)
    assert giga(contexts=2) < 1.96 * giga()  # what the two share


@pytest.mark.parametrize("part", ["sample", "train", "load"])
def test_rows_of_the_bench(part, one_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "A CPU"})
    if part == "load":
        monkeypatch.setattr(bench, "loading", lambda script, *where: (float(len(script)), 10**6))
    bench.main([part, "--runs", "1", "--batch", "2", "--steps", "3", "--save", "--device", "cpu"])
    (saved,), shown = (tmp_path / "assets").iterdir(), capsys.readouterr().out
    rows = json.loads(saved.read_text())["rows"]
    assert len(rows) == 1
    for row in rows:
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"]) and row["what"] in shown
        assert min(row["peak_ours"], row["peak_theirs"]) > 10**8 and (row["floor"] or 1) > 0


def test_saved_rows_replace_those_of_the_same_thing(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    bench.save_rows("A CPU", [{"model": "a", "what": "x", "ours": 1}, {"model": "b", "what": "x", "ours": 2}])
    bench.save_rows("A CPU", [{"model": "a", "what": "x", "ours": 3}, {"model": "a", "what": "y", "ours": 4}])
    saved = json.loads((tmp_path / "assets" / "bench-a-cpu.json").read_text())
    assert saved["machine"] == "A CPU" and [row["ours"] for row in saved["rows"]] == [3, 2, 4]


def test_load_is_timed_from_the_start_of_python(tiny):
    for script in (bench.LOAD_OURS, bench.LOAD_THEIRS):
        taken, size = bench.loading(script, tiny, "cpu", torch.float32)
        assert taken > 0.3 and size > 10**5


def test_a_bench_of_an_odd_size_says_so(one_process):
    with pytest.raises(UserError, match="--size 63: expected a multiple of 4"):
        bench.main(["train", "--size", "63", "--device", "cpu"])


# ── full size ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif("FULL" not in os.environ, reason="opt-in: FULL=1")
def test_full_size(tmp_path):
    """The SD 1.5 architecture in float16 files, 512×512: the same picture as diffusers'."""

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    words = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        eos_token_id=2))
    diffusers.StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text.half(), tokenizer=words, unet=unet.half(),
        scheduler=diffusers.DDIMScheduler(**weights.SCHEDULER), safety_checker=None, feature_extractor=None,
    ).save_pretrained(tmp_path / "sd")
    del unet, vae, text
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd", torch_dtype=torch.float32)
    theirs = pipe("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(5)).images[0]
    del pipe
    sample.main(["--weights", str(tmp_path / "sd"), "--prompt", "a cat", "--steps", "3", "--seed", "5",
                 "--principle", "none", "--dtype", "fp32", "--out", str(tmp_path / "out")])
    ours = Image.open(tmp_path / "out" / "0000.png")
    assert ours.size == (512, 512)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 3
