"""Check and show any preference data: `python -m lab.dataset check DIR`, `python -m lab.dataset show DIR`."""

import hashlib
import json
import math
import os
import warnings
from pathlib import Path

from PIL import ImageOps
from tqdm import tqdm

from common import UserError, read_json
from data import is_preservation, read_lines, read_sample
from formats.images import open_image
from formats.messages import expecting, one_line
from sample import captioned

# Of a contact sheet: principles, scenes per principle, images per row, pixels.
PRINCIPLES, SCENES, COLUMNS, SIDE = 50, 3, 8, 96
COUNTS = ("aligned", "violating", "preservation", "scenes", "prompts")


def check(root):
    """Read a whole dataset folder, pixels too -> {principle: {count: number}}, [fault].

    Finds what training would skip or fail on, and what it would accept unnoticed: a label other than 0 and 1, a path
    with "..", an image that a principle has in two scenes or with two labels, an unfinished set. Raises UserError if
    there is no dataset.
    """
    root, principles, faults, seen = Path(root), {}, [], {}
    labels, values = {}, {}  # {scene: labels, principles of its usable lines}
    for line, scene, where in tqdm(read_lines(root), "checking", disable=None, leave=False, unit=" lines"):
        try:
            sample = read_sample(line, scene, root, where)
        except (ValueError, OSError, RecursionError) as error:
            faults.append(f"{where}: {error}")
            continue
        faults += check_entry(json.loads(line), where)
        try:
            pixels = hash_pixels(sample.path)
        except Exception as error:  # a damaged file can raise anything in Pillow
            faults.append(f"{where}: {sample.path.name} is no readable image: {error}")
            continue
        first, *place = seen.setdefault((sample.value, pixels), (where, scene, sample.aligned))
        if place != [scene, sample.aligned]:  # copies within a scene only give an image more weight
            faults.append(f"{where}: {sample.path.name} is the same image as that of {first}")
        label = "preservation" if is_preservation(sample) else "aligned" if sample.aligned else "violating"
        labels.setdefault(scene, set()).add(label)
        values.setdefault(scene, set()).add(sample.value)
        counts = principles.setdefault(sample.value, {name: set() for name in COUNTS})
        for name, item in (label, where), ("scenes", scene), ("prompts", sample.prompt):
            counts[name].add(item)
    for scene, found in labels.items():
        if found in ({"aligned"}, {"violating"}):
            faults.append(f"{scene}: expected aligned and violating images, got only {found.pop()} ones")
        if len(values[scene]) > 1:
            faults.append(f"{scene}: expected one principle, got {', '.join(map(repr, sorted(values[scene])))}")
    numbers = {value: {name: len(items) for name, items in counts.items()} for value, counts in principles.items()}
    return numbers, faults + check_build(root)


def check_entry(entry, where):
    """-> the faults in a line that `read_sample` accepts."""
    faults = []
    if entry["label"] not in (0, 1):
        faults.append(f"{where}: expected 0 or 1 as label, got {entry['label']}: training takes it as violating")
    if ".." in Path(entry["file_name"]).parts:
        faults.append(f"{where}: expected a file of the scene, got {entry['file_name']}")
    return faults


def hash_pixels(path):
    image = open_image(path)
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


def check_build(root):
    """-> the faults in the scenes of a built set's dataset.json. They are null until the set is finished."""
    file = root / "dataset.json"
    scenes = read_json(file).get("scenes", {}) if os.path.lexists(file) else {}  # toy pairs have none
    if not isinstance(scenes, dict) or not all(
            facts is None or isinstance(facts, dict) and type(facts.get("images")) is int for facts in scenes.values()):
        raise UserError(f"{file}: expected an object as scenes, with a number of images each, got others")
    faults = []
    if unfinished := [scene for scene, facts in scenes.items() if facts is None]:
        faults.append(f"{file}: the set of {len(unfinished)} scenes is not finished: the same build command resumes it")
    for scene, facts in scenes.items():
        if facts and facts["images"] and not (root / scene / "metadata.jsonl").exists():
            faults.append(f"{root / scene}: expected {facts['images']} images, got no metadata.jsonl")
    return faults


def report(principles):
    """Print the numbers of `check`."""
    print(f"{'principle':40}" + "".join(f"{name:>13}" for name in COUNTS) + "   % of aligned")
    total = max(1, sum(counts["aligned"] for counts in principles.values()))
    for value, counts in principles.items():
        numbers = "".join(f"{counts[name]:13}" for name in COUNTS)
        print(f"{one_line(value):40}{numbers}{counts['aligned'] / total:15.0%}")


def contact_sheet(samples):
    """-> PIL image: for some scenes of every principle, a row of aligned images above one of violating ones."""
    scenes = {}  # {principle: {scene: its samples}}
    for sample in sorted(samples, key=is_preservation):  # pairs first
        scenes.setdefault(sample.value, {}).setdefault(sample.scene, []).append(sample)
    if len(scenes) > PRINCIPLES:  # of all, 20,000 would take 10 GB
        warnings.warn(f"the contact sheet shows {PRINCIPLES} of {len(scenes)} principles")
    rows = []
    for value, of_value in [*scenes.items()][:PRINCIPLES]:
        for scene in [*of_value][::math.ceil(len(of_value) / SCENES)]:
            for aligned, name in (True, "aligned"), (False, "violating"):
                chosen = [sample for sample in of_value[scene] if sample.aligned == aligned][:COLUMNS]
                if chosen:
                    rows.append((f"{value}, {scene.name}: {name}", [thumbnail(sample.path) for sample in chosen]))
    return captioned(rows)


def thumbnail(path):
    """The center of an image file, SIDE×SIDE pixels."""
    with expecting(path, "a readable image"):
        return ImageOps.fit(open_image(path), (SIDE, SIDE))
