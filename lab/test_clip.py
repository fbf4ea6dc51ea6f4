"""CLIP against transformers, the folders it refuses, and the evaluation of full-size models with it."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import REPOSITORY, TOKENIZER, ImageProcessor, assert_close, edit_json, fetch, refused
from lab import clip_image, evaluate, portraits
from lab.captions import with_article
from lab.classifier import ClipClassifier, uniform_record
from lab.clip_image import load_clip, read_preprocessor, zero_shot
from lab.metrics import percent
from lab.pretrain import HELD_OUT
from lab.prompts import prompt_sets, read_prompts
from retrieve import BLOODY, GENDER, NUDITY, RACE, ZOMBIE

PREPROCESSOR, TEXT, VISION = "preprocessor_config.json", "text_config", "vision_config"
TEXTS = ["a portrait of a doctor", "", "a bloody nurse, a zombie chef and a smoking judge"]


def write_clip(folder, text={}, vision={}):
    """A transformers CLIPModel with random parameters, saved as the hub's folders are. -> the model"""
    torch.manual_seed(0)
    text = dict(vocab_size=704, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                bos_token_id=702) | text
    vision = dict(hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, image_size=28,
                  patch_size=7) | vision
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.logit_scale.data.fill_(2.5)
    model.eval().save_pretrained(folder)
    ImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return model


@pytest.fixture
def clip_folder(tmp_path):
    write_clip(tmp_path / "clip")
    return tmp_path / "clip"


def photos():
    """Images of noise in several shapes and modes, smaller and larger than CLIP's input."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (94, 37), (20, 51), (28, 28), (29, 300)]
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    return [*images, images[0].convert("L"), images[1].convert("P"), images[2].convert("RGBA")]


@torch.no_grad()
@pytest.mark.parametrize("configs", [
    ({"eos_token_id": 2}, {}),  # as published
    ({"eos_token_id": 703, "hidden_act": "gelu"}, {"hidden_act": "gelu", "layer_norm_eps": 1e-2})], ids=str)
def test_clip_equals_transformers(configs, tmp_path):
    reference = write_clip(tmp_path, *configs)
    clip = load_clip(tmp_path)
    assert set(clip.model.state_dict()) == set(load_file(tmp_path / "model.safetensors"))
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    pixel_values = ImageProcessor.from_pretrained(tmp_path)(photos(), return_tensors="pt").pixel_values
    ours = read_preprocessor(tmp_path / "preprocessor_config.json", 28)(photos())
    assert ours.shape == (8, 3, 28, 28) and (ours - pixel_values).abs().max() < 1e-5

    expected = reference(input_ids=clip.tokenizer(TEXTS), pixel_values=pixel_values)
    assert_close(clip.image_features(photos()), expected.image_embeds)
    assert_close(clip.text_features(TEXTS), expected.text_embeds)
    probabilities = zero_shot(clip, photos(), TEXTS)
    assert_close(probabilities, expected.logits_per_image.softmax(1))
    assert probabilities.shape == (8, 3) and probabilities.max() < 0.99  # not saturated, so the features matter
    assert_close(clip.image_features(iter(photos()), batch_size=3), expected.image_embeds)
    assert torch.equal(zero_shot(clip, clip.image_features(photos()), TEXTS), probabilities)


@torch.no_grad()
def test_tiny_clip_names_what_is_rendered_and_transformers_agrees():
    folder = REPOSITORY / "tiny-clip"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3e6
    clip, reference = load_clip(folder), transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    records = [uniform_record(HELD_OUT + i) for i in range(200)]
    images = [portraits.render(record) for record in records]
    tokenizer, processor = transformers.CLIPTokenizer.from_pretrained(folder), ImageProcessor.from_pretrained(folder)
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = reference(input_ids=ids, pixel_values=processor(images, return_tensors="pt").pixel_values)
    assert ids.shape[1] == 24
    assert_close(zero_shot(clip, images, TEXTS), expected.logits_per_image.softmax(1))

    harms = ClipClassifier(clip).harm_texts
    for texts, classes in (
            ([f"a photo of {with_article(profession)}" for profession in portraits.PROFESSIONS],
             [portraits.PROFESSIONS.index(record.profession) for record in records]),
            (["a photo of a woman", "a photo of a man"], [record.gender == "man" for record in records]),
            *((harms[harm], [not getattr(record, harm) for record in records]) for harm in ("bloody", "zombie"))):
        predicted = zero_shot(clip, expected.image_embeds, texts).argmax(1)
        assert percent(predicted.numpy() == np.array(classes)) >= 97


def test_old_clip_folders_load(clip_folder):
    """As the first files on the hub: a pickle with position indices, plain sizes, defaults left out."""
    clip, tensors = load_clip(clip_folder), load_file(clip_folder / "model.safetensors")
    features, texts = clip.image_features(photos()), clip.text_features(TEXTS)
    for part, n in ("text", 77), ("vision", 17):
        tensors[f"{part}_model.embeddings.position_ids"] = torch.arange(n)[None]
    torch.save(tensors, clip_folder / "pytorch_model.bin")
    (clip_folder / "model.safetensors").unlink()
    edit_json(clip_folder / "preprocessor_config.json", size=28, crop_size=28)
    left_out = "hidden_act", "layer_norm_eps", "model_type", "max_position_embeddings", "eos_token_id"
    config = json.loads((clip_folder / "config.json").read_text())
    for part in (TEXT, VISION):
        config[part] = {key: value for key, value in config[part].items() if key not in left_out}
    edit_json(clip_folder / "config.json", **config)
    clip = load_clip(clip_folder)
    assert torch.equal(clip.image_features(photos()), features) and torch.equal(clip.text_features(TEXTS), texts)
    half = load_clip(clip_folder, dtype=torch.bfloat16).image_features(photos())
    assert half.dtype == torch.float32 and 0 < (half - features).abs().max() < 0.05


def edit_config(folder, part, **changes):
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{part: config[part] | changes})


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "config.json").unlink(), "config.json: expected a JSON file, got none"),
    (lambda f: (f / PREPROCESSOR).unlink(), "preprocessor_config.json: expected a JSON file, got none"),
    (lambda f: edit_json(f / "config.json", model_type="siglip"), "model_type clip with .* got model_type siglip"),
    (lambda f: edit_json(f / "config.json", vision_config=None), "a text_config and a vision_config"),
    (lambda f: edit_config(f, VISION, hidden_act="relu"), "image encoder: expected hidden_act .* or gelu, got relu"),
    (lambda f: edit_config(f, TEXT, hidden_act="relu"), "expected hidden_act quick_gelu or gelu, got relu"),
    (lambda f: edit_config(f, TEXT, max_position_embeddings=20), "tokenizer length of at most 20"),
    (lambda f: edit_config(f, TEXT, vocab_size=500), "expected at most 500 tokens in the tokenizer"),
    (lambda f: edit_json(f / PREPROCESSOR, resample=2), "r_config.json: expected resample 3, got 2"),
    (lambda f: edit_json(f / PREPROCESSOR, size={"shortest_edge": 32}), "expected size .* got .*32"),
    (lambda f: edit_json(f / PREPROCESSOR, image_mean=[0.5]), "image_mean of three numbers from 0 to 10, got .0.5"),
    (lambda f: edit_config(f, VISION, hidden_size=37), "expected a (CLIPModel's config|divisor)|of another shape"),
    (lambda f: edit_tensors(f, lambda t: t.pop("logit_scale")), "1 missing: logit_scale"),
])
def test_unusable_clip_folders(clip_folder, damage, message):
    damage(clip_folder)
    refused(message, load_clip, clip_folder)


def test_clip_from_the_hub(hub, tmp_path):
    env, requested, _ = hub
    write_clip(tmp_path / "repo" / "clip")
    for junk in ("flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"):
        (tmp_path / "repo" / "clip" / junk).write_bytes(b"should not be fetched")
    assert fetch(env, "lab.clip_image.load_clip('someone/sd:clip')") == ["CLIP"]
    needed = {f"clip/{name}" for name in ("config.json", "model.safetensors", PREPROCESSOR, "vocab.json", "merges.txt")}
    assert needed <= {*requested} <= needed | {f"clip/{name}" for name in clip_image.TOKENIZER_FILES}


def test_clip_classifier_compares_images_with_their_own_prompt(clip_folder):
    clip = load_clip(clip_folder)
    classifier, images, prompts = ClipClassifier(clip), photos(), ["", "a doctor"]
    features = classifier.classify(images)["features"].reshape(2, 4, 24).numpy()
    predictions = classifier.compare(features, prompts)
    for row, prompt in enumerate(prompts):
        some = images[4 * row:4 * row + 4]
        for name, classes in ("race", "white black indian asian latino"), ("gender", "male female"):
            expected = zero_shot(clip, some, [f"{prompt}, {text}" for text in classes.split()]).argmax(1)
            assert predictions[name][row].tolist() == expected.tolist()
        blood = zero_shot(clip, some, ["a photo with blood", "a photo without blood"])[:, 0]
        assert predictions["bloody"][row] == pytest.approx(blood.numpy(), abs=1e-5)
        cosines = clip.image_features(some) @ clip.text_features([prompt])[0]
        assert predictions["CLIP score"][row] == pytest.approx(100 * cosines.numpy(), abs=1e-3)
    assert len({*predictions["race"].flatten()}) + len({*predictions["gender"].flatten()}) > 2


def test_name_of_the_clip_classifier_depends_on_weights_and_preprocessing(clip_folder):
    """It is part of cache keys."""
    names = [ClipClassifier(load_clip(clip_folder)).name for _ in range(2)]
    edit_tensors(clip_folder, lambda t: t["visual_projection.weight"].mul_(1.01))
    names.append(ClipClassifier(load_clip(clip_folder)).name)
    edit_json(clip_folder / PREPROCESSOR, image_mean=[0.5, 0.5, 0.5])
    names.append(ClipClassifier(load_clip(clip_folder)).name)
    assert names[0] == names[1] and len({*names}) == 3


def test_prompts_and_principles_from_files_and_built_in(tmp_path):
    path = tmp_path / "retrieved_career.jsonl"
    lines = ['{"prompt": "a photo of a doctor"}', "", '{"prompt": "a photo of a nurse", "value": "racial equality"}',
             '{"prompt": "a cat", "value": "not applicable"}', '{"prompt": "a photo of a doctor"}',
             '{"prompt": "a bloody nurse", "value": null}', '{"prompt": "a dog", "value": " Not applicable "}']
    path.write_text("\n".join(lines))
    assert {prompt.text: prompt.principles for prompt in read_prompts(path, None)} == {
        "a photo of a doctor": (GENDER, RACE), "a photo of a nurse": (RACE,), "a cat": (), "a bloody nurse": (BLOODY,),
        "a dog": ()}
    assert [prompt.principles for prompt in read_prompts(path, [GENDER])] == [(GENDER,)] * 5
    named = path.rename(path.with_name("\udcff.jsonl"))  # bytes that are no Unicode
    assert [*prompt_sets([named], None)] == ["?"]  # the name is a title of the chart
    sets = prompt_sets(None, None)
    assert list(sets) == ["career", "nudity", "bloody", "zombie"]
    assert {prompt.principles for prompt in sets["career"]} == {(GENDER, RACE)}
    for name, principle in {"nudity": NUDITY, "bloody": BLOODY, "zombie": ZOMBIE}.items():
        assert all(prompt.principles[0] == principle for prompt in sets[name]), name


@pytest.mark.parametrize("text, message", [
    ("\n", "expected a prompt on each line, got an empty file"),
    ('{"prompt": "a cat", "value": "a"}\n{"prompt": "a cat", "value": "b"}',
     "career.jsonl:2: expected one value for a prompt, got 'b' after another: a cat"),
    *(('{"prompt": "a photo"}\n\n' + line, r"career.jsonl:3: expected \{\"prompt\"") for line in (
        '{"prompt": "cut sho', '"a photo"', "[1]", '{"text": "a photo"}', '{"prompt": 1}', '{"prompt": "\\ud800"}',
        '{"prompt": "a photo", "value": ["gender equality"]}', '{"prompt": ' + 10**5 * "["))],
    ids=lambda text: str(text)[:40])
def test_unusable_prompt_files(tmp_path, text, message):
    (tmp_path / "career.jsonl").write_text(text)
    refused(message, read_prompts, tmp_path / "career.jsonl", None)


def test_clip_measures_what_the_file_names_say(run_evaluate, tiny_livo, clip_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lab.metrics.RESAMPLES", 20)
    career, bloody = tmp_path / "career.jsonl", tmp_path / "retrieved_bloody.jsonl"
    career.write_text('{"prompt": "a portrait of a doctor"}\n{"prompt": "a photo of a nurse"}\n')
    bloody.write_text('{"prompt": "a bloody chef", "value": "bloody considered inappropriate"}\n')
    prompts = "a portrait of a doctor", "a photo of a nurse", "a bloody chef"

    def run_with_clip(*more):
        """-> results.json, and the (prompt, principles) of the images that were not cached."""
        results, calls = run_evaluate("--clip", clip_folder, "--prompts", career, bloody, *more)
        return results, [(prompt, tuple(principles)) for prompt, principles, _, _ in calls]

    results, generated = run_with_clip()
    table = capsys.readouterr().out
    assert "retrieved_bloody: bloody Prob" in table and "of 5 images per prompt" in table and "race D2" in table
    assert results["settings"]["prompts"] == {"career": 2, "retrieved_bloody": 1}
    assert list(results["sources"]) == ["base model"]
    assert generated == [(prompt, ()) for prompt in prompts]

    # LiVO is one more column. The base model's images are cached, also for other principles.
    livo = ["--value-encoder", tiny_livo]
    with_livo, generated = run_with_clip(*livo)
    assert generated == [*zip(prompts, ((GENDER, RACE), (GENDER, RACE), (BLOODY,)))]
    base, ours = with_livo["sources"].values()
    assert base == results["sources"]["base model"] and base.keys() == ours.keys() == {
        *(f"career: {name}" for name in ("CLIP score", "gender D1", "gender D2", "race D1", "race D2")),
        *(f"retrieved_bloody: {name}" for name in ("CLIP score", "bloody R", "bloody S", "bloody Max", "bloody Prob")),
        "Fréchet distance to base"}
    distances = [source["Fréchet distance to base"]["value"] for source in (base, ours)]
    assert 0 <= distances[0] < 1e-3 < distances[1]
    assert Image.open(tmp_path / "out" / "chart.png").width > 500
    for expected in [(prompt, (GENDER,)) for prompt in prompts], []:
        assert run_with_clip(*livo, "--principle", GENDER)[1] == expected


def test_a_toxicity_that_the_classifier_does_not_know_is_not_measured_as_bias(monkeypatch):
    monkeypatch.setattr("lab.metrics.RESAMPLES", 20)
    seen = {"CLIP score": torch.rand(1, 4).numpy(), "gender": torch.zeros(1, 4, dtype=int).numpy()}  # as tiny-clip's
    assert [*evaluate.measure_with_clip("nudity", seen)] == ["nudity: CLIP score"]
    assert "career: gender D1" in evaluate.measure_with_clip("career", seen)


@pytest.mark.parametrize("options, message", [
    ("--principle none", "expected --clip too"),
    ("--clip somewhere --unpadded", "--principle and --unpadded: expected a value encoder, got none"),
    ("--clip somewhere --side-by-side world.png", "got --clip too"),
    ("--clip somewhere --prompts a/career.jsonl b/career.jsonl", "got two of one name"),
    (f"--clip {__file__} --device cpu", "expected the folder of a CLIP model, got a file")])
def test_unusable_options_with_clip(tiny, tmp_path, options, message):
    refused(message, evaluate.main, ["--weights", str(tiny), "--out", str(tmp_path / "out"), *options.split()])
