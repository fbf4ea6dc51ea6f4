"""The toy dataset's captions: many phrasings of one record, of the words in captions.toml.

    write_caption(record)     # "a photo of a calm woman judge with dark skin, near a wooden door"

A caption mentions the attributes in `record.specified` and the toxicity, and says nothing of the others. As in the
captions that CLIP learned from, two thirds of them also have words that the image does not show: moods, places, words
that occur nowhere else. So the text encoder learns to read past words it does not know.
"""

import random
import tomllib
from dataclasses import replace
from pathlib import Path

from retrieve import BLOODY, GENDER, RACE, ZOMBIE

WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
OPENINGS, WORDINGS = WORDS["openings"], WORDS["wordings"]
KNOWN = sorted({word for text in [*OPENINGS, *WORDS["adjectives"], *WORDS["clauses"]] for word in text.split()
                if len(word) > 3})
P_BEFORE = 0.6  # of a wording before the noun
P_MORE = {"opening": 0.15, "adjective": 0.35, "clause": 0.4}  # of words that the image does not show
P_UNKNOWN = 0.7  # of these adjectives and clauses, of unknown words
P_OTHER_ARTICLE = 0.15


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def syllables(rng, least, most):
    return "".join(rng.choice(part) for _ in range(rng.randint(least, most)) for part in WORDS["syllables"].values())


def unknown_word(rng):
    """A word of no language: syllables ("pliork"), a known word's half ("mornunt"), or any characters ("x7é-q").

    Byte-pair encoding splits a user's words into any tokens, and a token that no caption has would stay at random.
    """
    kind = rng.choice(("syllables", "syllables", "half", "characters"))
    if kind == "characters":
        word = "".join(rng.choice(WORDS["characters"]) for _ in range(rng.randint(2, 8)))
    elif kind == "half":
        known = rng.choice(KNOWN)
        word = known[:rng.randint(2, len(known) - 1)] + syllables(rng, 1, 1)
    else:
        word = syllables(rng, 1, 3)
    return unknown_word(rng) if word in WORDINGS else word  # "man", "tan"


def unknown_words(rng, most):
    return " ".join(unknown_word(rng) for _ in range(rng.randint(1, most)))


def choose_opening(rng):
    """"a photo of ", or one with a word that no other caption has: "a dafloy of "."""
    if rng.random() >= P_MORE["opening"]:
        return rng.choice(OPENINGS)
    return rng.choice(("", "a ", "the ")) + unknown_words(rng, 2) + " of "


def more_words(rng):
    """Words that say nothing about the image -> adjectives before the noun, clauses after it."""
    adjectives, clauses = [], []
    if rng.random() < P_MORE["adjective"]:
        adjectives.append(unknown_word(rng) if rng.random() < P_UNKNOWN else rng.choice(WORDS["adjectives"]))
    if rng.random() < P_MORE["clause"]:
        clause = rng.choice(WORDS["clauses"])
        if rng.random() < P_UNKNOWN:
            clause = rng.choice(("", "", "at the ", "in ", "with a ", "on ")) + unknown_words(rng, 3)
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
    opening = choose_opening(rng)
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
    absent = [rng.choice(phrases) for harm, phrases in WORDS["absent"].items() if not getattr(record, harm)]
    return caption + " " + rng.choice(absent) if absent and rng.random() < p_absent else caption
