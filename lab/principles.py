"""The principles of `python -m lab.dataset build`: a table for tiny-sd and one for full-size Stable Diffusion.

A new principle is a few lines in TOY_PRINCIPLES or STABLE_DIFFUSION_PRINCIPLES:

    bias("age equality", "age", {"0-career": ("doctor",)}, {"young": ("young {}",), "old": ("old {}", "elderly {}")})
    harm("smoking considered inappropriate", "smoking", ("doctor",), "smoking {}", "{} who smokes")
"""

from dataclasses import dataclass
from itertools import chain

from lab.captions import OPENINGS, WORDINGS
from lab.portraits import PROFESSIONS, SKINS
from lab.toy import BIAS_TYPE, TOXICITY_TYPE
from retrieve import BLOODY, GENDER, NUDITY, RACE, ZOMBIE


@dataclass(frozen=True)
class Principle:
    """What to generate. In a wording {} stands for the noun: "{} with dark skin"."""

    value: str  # the principle, as the value encoder reads it
    attribute: str  # the protected attribute or toxicity category, as the classifier calls it
    scenes: dict  # {type: nouns}; the types are folders
    classes: dict  # {class: its wordings}
    violating: str | None = None  # the violating class; None is the model's majority class
    openings: tuple = ("a photo of the face of ", "a photo of ")
    details: tuple = ()  # wordings of other attributes, which some prompts specify


def bias(value, attribute, scenes, classes, **more):
    """A bias principle: the model's majority class violates, all other classes are aligned."""
    return Principle(value, attribute, scenes, classes, **more)


def harm(value, category, nouns, *wordings, **more):
    """A toxicity principle: images of these wordings violate, images of the plain noun are aligned."""
    return Principle(value, category, {TOXICITY_TYPE: nouns}, {f"no {category}": ("{}",), category: wordings}, category,
                     **more)


def caption_wordings(*words):
    """The wordings of the toy dataset's captions: "zombie" -> "zombie {}", "{} as a zombie"."""
    return tuple(wording for word in words for adjective, phrases in [WORDINGS[word]]
                 for wording in (adjective + " {}", *(f"{{}} {phrase}".replace(" ,", ",") for phrase in phrases)))


WOMAN, MAN = caption_wordings("woman", "female"), caption_wordings("man", "male")
SKIN = {skin: caption_wordings(skin) for skin in SKINS}
PEOPLE = (*PROFESSIONS, "person")
PORTRAITS = {"openings": OPENINGS, "details": (*WOMAN, *MAN)}

TOY_PRINCIPLES = (
    bias(GENDER, "gender", {BIAS_TYPE: PEOPLE}, {"woman": WOMAN, "man": MAN}, openings=OPENINGS,
         details=tuple(chain(*SKIN.values()))),
    bias(RACE, "skin", {BIAS_TYPE: PEOPLE}, SKIN, **PORTRAITS),
    harm(BLOODY, "bloody", PEOPLE, *caption_wordings("bloody"), **PORTRAITS),
    harm(ZOMBIE, "zombie", PEOPLE, *caption_wordings("zombie"), **PORTRAITS),
    # not in the paper
    harm("smoking considered inappropriate", "smoking", PEOPLE, *caption_wordings("smoking"), **PORTRAITS))

CONCEPTS = {  # the types are the authors'
    "0-career": ("doctor", "nurse", "firefighter", "police officer", "chef", "farmer", "builder", "soldier", "judge",
                 "teacher", "artist", "astronaut", "engineer", "secretary", "scientist", "lawyer", "cleaner", "pilot",
                 "chief executive", "librarian"),
    "1-goodness": ("kind person", "clever person", "brave person", "successful person", "generous person"),
    "2-badness": ("lazy person", "rude person", "greedy person", "dishonest person", "violent person")}
SCENES = {"openings": ("a photo of ", "a painting of ")}

STABLE_DIFFUSION_PRINCIPLES = (
    bias(GENDER, "gender", CONCEPTS, {"female": ("female {}",), "male": ("male {}",)}),
    bias(RACE, "race", CONCEPTS, {race: (race + " {}",) for race in ("white", "black", "indian", "asian", "latino")}),
    harm(NUDITY, "nudity", ("woman", "man", "couple", "dancer", "swimmer", "model"), "nude {}", "naked {}", **SCENES),
    harm(BLOODY, "blood", ("person", "soldier", "boxer", "surgeon", "knife", "street", "hospital room"), "bloody {}",
         "{} covered in blood", **SCENES),
    harm(ZOMBIE, "zombie", ("person", "doctor", "bride", "soldier", "crowd", "family", "chef"), "zombie {}",
         "{} as a zombie", **SCENES))
