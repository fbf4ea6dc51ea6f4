"""Fixtures of the tests of checkpoints: random pipelines of diffusers, and the hub on a local server."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import diffusers
import pytest

from conftest import REPOSITORY, SD1, diffusers_pipeline, levels


def full_vocabulary_pipeline(sd2):
    """Small, but with the vocabulary and the number of norm groups of the published models, which files do not tell."""
    scheduler = diffusers.DDIMScheduler.from_config(
        SD1 | {"prediction_type": "v_prediction" if sd2 else "epsilon"})
    unet = dict(cross_attention_dim=64, sample_size=96 if sd2 else 64, use_linear_projection=sd2, upcast_attention=sd2)
    unet |= levels(64, 128) | dict(attention_head_dim=[1, 2]) if sd2 else levels(32, 64, 64) | dict(layers_per_block=1)
    text = dict(vocab_size=49408, hidden_size=64, intermediate_size=96, num_attention_heads=1, eos_token_id=2,
                hidden_act="gelu" if sd2 else "quick_gelu")
    return diffusers_pipeline(scheduler, unet, dict(block_out_channels=(32, 64), layers_per_block=2), text)


@pytest.fixture(scope="session")
def pipe():
    return full_vocabulary_pipeline(sd2=False)


@pytest.fixture(scope="session")
def pipe2():
    return full_vocabulary_pipeline(sd2=True)


@pytest.fixture(scope="session")
def published(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "sd"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def sd_folder(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "sd"))


# ── The hub, on a local server ───────────────────────────────────────────────────────────────────────────────────────


def answer(path, repositories, requested):
    """A request's path -> status, headers and body, as the hub answers."""
    kind = re.fullmatch(r"/(api/models/)?([^/]+/[^/]+?)(?:/(revision|resolve|tree)/[^/]+/?(.*))?", path.split("?")[0])
    folder = kind and repositories.get(kind[2])
    if not folder:
        return 404, {"X-Error-Code": "RepoNotFound"}, b""
    if not kind[1]:
        requested.append(kind[4])
        return 200, {"ETag": f'"{abs(hash(kind[4]))}"'}, (folder / kind[4]).read_bytes()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    listing = {"id": kind[2], "sha": "c" * 40, "siblings": [{"rfilename": name} for name in files]}
    if kind[3] == "tree":
        listing = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": "e" * 40}
                   for name, path in files.items()]
    return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()


@pytest.fixture
def hub(published, tmp_path):
    """Repositories with files that should not be fetched too. -> (environment, files requested, server)"""
    repositories, requested = {"someone/sd": tmp_path / "repo", "someone/livo": tmp_path / "livo"}, []
    shutil.copytree(published, tmp_path / "repo")
    shutil.copytree(published / "text_encoder", tmp_path / "livo/deep/value_encoder")
    for junk in ("safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin", "sd-v1-5.ckpt",
                 "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack",
                 "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (tmp_path / "repo" / junk).parent.mkdir(exist_ok=True)
        (tmp_path / "repo" / junk).write_bytes(b"should not be fetched")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answer(self.path, repositories, requested)
            self.send_response(status)
            for key, value in {"X-Repo-Commit": "c" * 40, **headers, "Content-Length": len(body)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD, log_message = do_GET, lambda *args: None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    yield env, requested, server
    server.shutdown()
    server.server_close()


FETCH = """
import sys, warnings, common, weights, lab.clip_image
for call in sys.argv[1:]:
    with warnings.catch_warnings(record=True) as caught:
        try:
            print(type(eval(call)).__name__, *(warning.message for warning in caught))
        except common.UserError as error:
            print("error:", common.one_line(error))
"""


def fetch(env, *calls):
    """-> for each call a line, what it loads and warns of, or its error.

    In a process of its own, because huggingface_hub reads the environment when it is imported.
    """
    return subprocess.run([sys.executable, "-c", FETCH, *calls], env=env, stdout=subprocess.PIPE, text=True,
                          cwd=REPOSITORY, check=True).stdout.splitlines()
