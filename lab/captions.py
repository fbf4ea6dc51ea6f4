"""The toy dataset's captions: many phrasings of one record.

    write_caption(record)     # "a photo of a calm woman judge with dark skin, near a wooden door"

A caption mentions the attributes in `record.specified` and the toxicity, and says nothing of the others. As in the
captions that CLIP learned from, half of them also have words that the image does not show: moods, places, words that
occur nowhere else. So the text encoder learns to read past words it does not know.
"""

import random
from dataclasses import replace

from retrieve import BLOODY, GENDER, RACE, ZOMBIE

# No opening, adjective or clause of the evaluation is here ("smiling", "happy", "at work", …).
OPENINGS = ("", "a portrait of ", "a photo of ", "a picture of ", "a photo of the face of ", "the face of ",
            "a close-up of ", "a cartoon of ", "a drawing of ", "a painting of ", "an image of ", "portrait of ",
            "photograph of ", "a headshot of ")  # fmt: skip
# {word: (what may stand before the noun, what may stand after it)}
WORDINGS = {
    "bloody": ("bloody", ("covered in blood", "with blood on the face", "with blood")),
    "smoking": ("smoking", ("smoking a cigarette", "who smokes")),
    "zombie": ("zombie", ("as a zombie", "who is a zombie")),
    **{gender: (gender, (f"who is a {gender}", f", {gender}")) for gender in ("woman", "man")},
    **{gender: (gender, (f"who is {gender}", f", {gender}")) for gender in ("female", "male")},
    **{skin: (f"{skin}-skinned", (f"with {skin} skin", f", {skin} skin")) for skin in ("pale", "light", "tan", "brown",
                                                                                       "dark")},
}  # fmt: skip
ABSENT = {"bloody": ("without blood", "who is clean"), "zombie": ("who is alive", "without zombies"),
          "smoking": ("without a cigarette",)}  # fmt: skip
P_BEFORE = 0.6  # of a wording before the noun
P_MORE = {"adjective": 0.25, "clause": 0.25}  # of words that the image does not show
P_UNKNOWN = 0.4  # of these, an unknown word
P_OTHER_ARTICLE = 0.15
ADJECTIVES = ("young", "old", "calm", "serious", "tired", "proud", "famous", "good", "kind", "busy", "clever", "tall")
CLAUSES = ("near a wooden door", "in the city", "at home", "on a sunny day", "looking at the camera", "in the morning",
           "waiting for a bus", "with a friend", "in winter", "by the sea", "thinking", "standing", "in a good mood",
           "talking", "outdoors", "from the village", "of the year", "at night")  # fmt: skip
# Parts of a syllable
ONSETS = ("", *"bcdfghjklmnprstvwyz", "bl", "br", "ch", "cl", "cr", "dr", "fl", "gr", "pl", "pr", "sh", "sm", "sp",
          "st", "th", "tr", "wh", "qu")  # fmt: skip
VOWELS = (*"aeiou", *"aeiou", "ai", "ea", "ee", "oo", "ou", "io")
CODAS = ("", "", "", *"dlmnrstkpy", "ck", "ng", "nt", "pp", "rk", "st", "ing", "ed", "er", "ly")


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def unknown_word(rng):
    """One to three syllables of no language: "pliork"."""
    word = "".join(rng.choice(part) for _ in range(rng.randint(1, 3)) for part in (ONSETS, VOWELS, CODAS))
    return unknown_word(rng) if word in WORDINGS else word  # "man", "tan"


def more_words(rng):
    """Words that say nothing about the image -> adjectives before the noun, clauses after it."""
    adjectives, clauses = [], []
    if rng.random() < P_MORE["adjective"]:
        adjectives.append(unknown_word(rng) if rng.random() < P_UNKNOWN else rng.choice(ADJECTIVES))
    if rng.random() < P_MORE["clause"]:
        clause = rng.choice(CLAUSES)
        if rng.random() < P_UNKNOWN:
            clause = rng.choice(("", "at the ", "in ", "with a ")) + unknown_word(rng)
        clauses.append(rng.choice(("", ", ")) + clause)
    return adjectives, clauses


def phrase(rng, opening, noun, words):
    """Opening, article, words before the noun, noun, words after it; some words that say nothing."""
    before, after = more_words(rng)
    for word in words:
        adjective, phrases = WORDINGS[word]
        if rng.random() < P_BEFORE:
            before.append(adjective)
        else:
            after.append(rng.choice(phrases))
    rng.shuffle(after)
    person = " ".join([*before, noun])
    other = rng.choice(("the " + person, person, "one " + person))
    person = other if rng.random() < P_OTHER_ARTICLE else with_article(person)
    return (opening + " ".join([person, *after])).replace(" ,", ",")


def name_principle(rng, record):
    """-> a principle that is true of the record, and the attribute that the caption then leaves out."""
    true = [(principle, attribute) for principle, attribute in ((GENDER, "gender"), (RACE, "skin"))
            for _ in range(2) if attribute in record.specified]
    true += [(principle, None) for harm, principle in (("bloody", BLOODY), ("zombie", ZOMBIE))
             if not getattr(record, harm)]
    return rng.choice(true or [(None, None)])


def write_caption(record, p_principle=0.0, p_absent=0.0):
    """One of many phrasings, chosen by the record's seed. It mentions `record.specified` and the toxicity, no more.

    p_principle: of a principle in front. The equality principles stand before images whose gender or skin is uniform,
    the toxic principles before images without that toxicity. p_absent: of words for the absence of a toxicity category.
    """
    rng = random.Random(f"caption {record.seed}")
    if rng.random() < p_principle:
        principle, left_out = name_principle(rng, record)
        if principle:
            record = replace(record, specified=record.specified - {left_out})
            return f"{principle}, {write_caption(record, 0, p_absent)}"
    opening = rng.choice(OPENINGS)
    noun = record.profession if "profession" in record.specified else "person"
    words = [harm for harm in ("bloody", "smoking") if getattr(record, harm)]
    if "skin" in record.specified:
        words.append(record.skin)
    if record.zombie:
        words.append("zombie")
    if "gender" in record.specified:
        if noun == "person":
            noun = record.gender
        else:
            words.append(rng.choice({"woman": ("woman", "female"), "man": ("man", "male")}[record.gender]))
    caption = phrase(rng, opening, noun, words)
    absent = [rng.choice(phrases) for harm, phrases in ABSENT.items() if not getattr(record, harm)]
    return caption + " " + rng.choice(absent) if absent and rng.random() < p_absent else caption
