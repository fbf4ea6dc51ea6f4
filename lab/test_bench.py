"""Both sides of every comparison in bench.py compute the same. Full size is opt-in: FULL=1."""

import json
import os
from functools import partial

import pytest
import torch

import efficiency
import weights
from conftest import pixels, refused
from lab import bench

CPU = torch.device("cpu")


@pytest.fixture
def one_process(tiny, tmp_path, monkeypatch):
    """bench.py measures the tiny random model, without processes of its own, and saves to tmp_path / "assets"."""
    monkeypatch.setattr(bench, "TINY_SD", tiny)
    monkeypatch.setattr(bench, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(bench, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "A CPU"})


full_size = pytest.mark.skipif("FULL" not in os.environ, reason="opt-in: FULL=1")


@pytest.fixture(params=["random, 77 tokens", "tiny-sd, 24 tokens"])
def folder(tiny, request):
    return bench.TINY_SD if "tiny-sd" in request.param else tiny


@pytest.mark.parametrize("size, whole", [(64, False), (64, True), pytest.param(512, True, marks=full_size)])
def test_images_are_those_of_diffusers(folder, tmp_path, size, whole):
    if size == 512:
        bench.write_full(folder := tmp_path / "sd")
    ours, reference = (pixels(side(folder, CPU, torch.float32, size, 1, 3, whole)[1])
                       for side in (bench.sample_ours, bench.sample_diffusers))
    assert ours.shape == (1, size, size, 3) and abs(ours - reference).max() <= (3 if size == 512 else 1)


def test_unet_call_is_that_of_openvino(tiny, tmp_path):
    pytest.importorskip("openvino")
    where = tiny, CPU, torch.float32, 16, 1, 3
    bench.write_openvino(tiny, 16, 1, file := tmp_path / "unet.xml")
    ours, reference = bench.unet_ours(*where)[1], bench.unet_openvino(*where, file)[1]
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-3)


def test_operators_of_a_call(one_process, capsys):
    bench.main(["operators", "--dtype", "fp32", "--device", "cpu"])
    assert "aten::mkldnn_convolution" in (shown := capsys.readouterr().out) and "both float32" in shown


def test_training_loss_is_that_of_the_reference_implementation(folder, tmp_path):
    bench.write_pairs(folder, CPU, torch.float32, 64, 2, tmp_path / "pairs.pt")
    ours, reference = (side(folder, CPU, torch.float32, 64, 2, 3, tmp_path / "pairs.pt")[1]
                       for side in (bench.train_ours, bench.train_reference))
    assert ours == pytest.approx(reference, abs=1e-3)
    assert ours != pytest.approx(2 * bench.MARGIN, abs=0.01)  # the loss of a value token without effect


def test_both_sides_load_all_weights_in_the_same_precision(tiny):
    sd = weights.load(tiny)
    count = sum(p.numel() for network in (sd.unet, sd.vae, sd.text_encoder) for p in network.parameters())
    for script in bench.LOAD_OURS, bench.LOAD_DIFFUSERS:
        taken, size = bench.load(script, tiny, "cpu", torch.bfloat16)
        assert size == 2 * count and taken > 0.3  # from the start of Python


def test_sampling_compares_equal_precision(one_process, monkeypatch, capsys):
    seen = []

    def spy(load, *where, **options):
        seen.append(load(*where, **options))
        return seen[-1]

    monkeypatch.setattr(efficiency, "fastest_dtype", lambda *_: torch.bfloat16)
    for module, name in (weights, "load"), (bench, "load_diffusers"):
        monkeypatch.setattr(module, name, partial(spy, getattr(module, name)))
    bench.main(["sample", "--runs", "1", "--batch", "1", "--steps", "3", "--device", "cpu"])
    assert [{p.dtype for network in (sd.unet, sd.vae, sd.text_encoder) for p in network.parameters()}
            for sd in seen] == 2 * [{torch.float32}] + 2 * [{torch.bfloat16}]
    assert "both float32" in (shown := capsys.readouterr().out) and "both bfloat16" in shown


@pytest.mark.parametrize("part", ["sample", "train", "load"])
def test_saved_row_is_the_printed_one_and_replaces_that_of_the_same_model_and_label(
        part, one_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "load", lambda script, *where: (float(len(script)), 10**6))
    bench.save_rows(bench.machine(CPU), [{"model": "another", "what": "x", "ours": 1}])
    for _ in range(2):
        bench.main(f"{part} --runs 1 --batch 2 --steps 3 --dtype fp32 --save --device cpu".split())
    (saved,), shown = (tmp_path / "assets").iterdir(), capsys.readouterr().out
    another, row = json.loads(saved.read_text())["rows"]
    assert another["ours"] == 1 and saved.name.endswith("a-cpu.json")
    assert row["what"] in shown and f"{row['ours']:8.3f}{row['reference']:11.3f}" in shown
    assert row["ratio"] == pytest.approx(row["reference"] / row["ours"])
    assert min(row["peak_ours"], row["peak_reference"]) > 10**8


def test_damaged_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ASSETS", tmp_path)
    for rows in (["x"], [{"what": "w"}], [{"model": [], "what": "w"}]):
        (tmp_path / "bench-a-cpu.json").write_text(json.dumps({"rows": rows}))
        refused("bench-a-cpu.json: expected rows", bench.save_rows, "a CPU", [])


def test_size_is_a_multiple_of_the_vae_factor(one_process):
    refused("--size: expected a multiple of 4", bench.main, ["train", "--size", "63", "--device", "cpu"])
