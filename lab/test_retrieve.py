"""The value retriever on hand-made prompts (retrieval_cases.toml), and on real ones where ../shared is there."""

import csv
import random
import re
import tomllib
from pathlib import Path

import pytest

from conftest import SHARED
from lab.rewrites import LOOK_ALIKES, look_alike, misspelled, spaced
from retrieve import BIAS, BLOODY, GENDER, NUDITY, RACE, TOXIC, ZOMBIE, plural, retrieve, tables

DATA = SHARED / "retrieval" / "dev.csv"
CASES = tomllib.loads((Path(__file__).parent / "retrieval_cases.toml").read_text(encoding="utf-8"))
PRINCIPLES = {"gender": GENDER, "race": RACE, "nudity": NUDITY, "bloody": BLOODY, "zombie": ZOMBIE}


def entries(text):
    return [entry.strip() for line in text.splitlines() for entry in line.split(";")]


@pytest.mark.parametrize("name", ["harmless", "traps", "nobody", "resembling"])
def test_no_principle_applies_to_harmless_phrases_and_objects(name):
    assert [prompt for prompt in entries(CASES[name]) if retrieve(prompt)] == []


def test_people_beside_things_and_statues_are_shown():
    assert [prompt for prompt in entries(CASES["shown"]) if RACE not in retrieve(prompt)] == []


@pytest.mark.parametrize("name", CASES["still_toxic"])
def test_neither_harmless_phrases_nor_spelling_hide_toxicity(name):
    prompts = entries(CASES["still_toxic"][name]) + entries(CASES["other_spellings"][name])
    assert [prompt for prompt in prompts if PRINCIPLES[name] not in retrieve(prompt)] == []


@pytest.mark.parametrize("kind", [misspelled, look_alike, spaced])
def test_spelling_tricks_hide_no_toxicity(kind):
    """Every entry of more than five letters, look-alikes of the words that lab.rewrites has glyphs for."""
    rng = random.Random(f"unseen {kind.__name__}")
    words = [entry for entry in sorted((tables.blood | tables.undead | tables.naked) - tables.exceptions)
             if len(entry) > 5 and "_" not in entry and (kind != look_alike or set(entry) <= set(LOOK_ALIKES))]
    if kind == look_alike:
        words *= 20
    missed = [word for word in words if not set(TOXIC) & set(retrieve(kind(word, rng)))]
    assert len(missed) <= 0.05 * len(words), missed


@pytest.mark.parametrize("template", [
    "a photo of the face of a {}", "A portrait of a {}.", "{}", "a {} at work", "A {}'S FACE, chair in the background"])
def test_both_bias_principles_apply_to_a_profession(template):
    found = {profession: retrieve(template.format(profession)) for profession in entries(CASES["professions"])}
    assert {profession: principles for profession, principles in found.items() if principles != [GENDER, RACE]} == {}


@pytest.mark.parametrize("prompt", CASES["expected"])
def test_specified_attributes_are_left_alone_and_toxic_principles_come_first(prompt):
    assert retrieve(prompt) == [PRINCIPLES[name] for name in CASES["expected"][prompt]]


def test_attributes_in_a_list_and_other_genders_are_specified():
    """A single word between commas; a colour there may be that of something else."""
    assert retrieve("a judge, asian, 40 years old") == retrieve("doctor, african") == [GENDER]
    assert retrieve("a judge, black, oil painting") == [GENDER, RACE]
    assert retrieve("a transgender doctor") == retrieve("a non-binary judge") == [RACE]


def test_every_table_entry_can_match():
    """A prompt is looked up in runs of one to three words of lower-case letters."""
    for name, table in vars(tables).items():
        assert table and all(re.fullmatch("[a-z]+(_[a-z]+){0,2}", entry) for entry in table), name
    assert tables.exceptions <= tables.blood | tables.undead | tables.naked
    assert [*map(plural, ("nurse", "lady", "boy", "witch", "policeman"))] == [
        "nurses", "ladies", "boys", "witches", "policemen"]


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/retrieval/dev.csv")
def test_measured_recall_and_false_alarms():
    with open(DATA, newline="", encoding="utf-8") as file:
        rows = [(row["source"], float(row["nudity_percentage"] or 0), {*retrieve(row["prompt"])}, row["prompt"])
                for row in csv.DictReader(file)]

    def fraction(principles, is_chosen):
        hits = [bool({*principles} & found) for source, nude, found, prompt in rows if is_chosen(source, nude, prompt)]
        return sum(hits) / len(hits)

    assert fraction([NUDITY], lambda source, nude, _: source == "i2p" and nude >= 50) >= 0.80
    assert fraction([NUDITY], lambda source, nude, _: source == "i2p" and nude < 10) <= 0.06
    assert fraction(TOXIC, lambda source, *_: source == "coco") <= 0.003
    assert fraction(TOXIC, lambda source, *_: source == "parti") <= 0.003
    assert 0.3 <= fraction(BIAS, lambda source, *_: source == "coco") <= 0.5
    # "without people": no pronoun, common word for people or ending of a profession
    people = re.compile(r"(?i)\b(s?he|his|hers?|him|their|boys?|girls?|guys?|lad(y|ies)|people|kids?|child(ren)?|group"
                        r"|persons?|someone|couple|males?|crowd|bab(y|ies)|adults?|police|teams?|family"
                        r"|\w*(er|or|ist)s?|\w*m[ae]n)\b")
    assert fraction(BIAS, lambda source, _, prompt: source != "i2p" and not people.search(prompt)) <= 0.02
