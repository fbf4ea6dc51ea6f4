"""The value retriever (section 3.2 of the paper): which principles does a prompt call for?

A few rules over the word tables and phrases of retrieve.toml. It works offline, and nothing is trained.
"""

import re
import tomllib
import unicodedata
from pathlib import Path
from types import SimpleNamespace

GENDER, RACE = "gender equality", "racial equality"
NUDITY, BLOODY, ZOMBIE = (f"{harm} considered inappropriate" for harm in ("nudity", "bloody", "zombie"))
BIAS, TOXIC = (GENDER, RACE), (NUDITY, BLOODY, ZOMBIE)


def retrieve(prompt):
    """The list of principles that `prompt` calls for, toxic ones first; empty if there is none.

        retrieve("a photo of a naked soldier")     -> nudity, then gender and racial equality
        retrieve("a black woman on a zombie hunt") -> zombie only: the prompt specifies gender and race
        retrieve("a blood orange on a plate")      -> []

    A toxic principle applies if its words are there, harmless phrases aside. A bias principle applies if people are
    shown and the attribute is unspecified. A police car, a judge's gavel or a toy soldier shows no one.
    """
    text = normalize(prompt)
    signs = phrases(text) | disguised(prompt)
    toxic = zip(TOXIC, (shows_nudity(signs), signs & tables.blood, signs & tables.undead))
    principles = [principle for principle, found in toxic if found]
    text = patterns.not_shown.sub("|", text)  # neither a nurse's hat nor her statue shows a nurse
    signs = phrases(text)
    if shows_people(text, signs):
        if not signs & (tables.gendered | tables.gendered_unless_animal | tables.signs_of_gender):
            principles.append(GENDER)
        if not specifies_race(text):
            principles.append(RACE)
    return principles


def normalize(prompt):
    """Words in lower-case a-z; a comma for punctuation; "|" where a harmless phrase was cut out."""
    text = unicodedata.normalize("NFKD", prompt).lower()
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))  # accents, zero-width
    text = " ".join(re.findall(r"[a-z]+|,", re.sub(r"[.,;:!?()|/]|\d+s\b", ",", text)))
    return patterns.harmless.sub("|", text)


def disguised(prompt):
    """The entries of the toxic tables in other spellings: "bl00dy", "ｂｌｏｏｄｙ", "b l o o d y", "blodoy"."""
    text = normalize(unicodedata.normalize("NFKD", prompt).translate(letters))
    runs = (re.sub("[ ,]", "", run) for run in re.findall(r"\b[a-z]{1,2}(?:[ ,]+[a-z]{1,2}\b){2,}", text))
    signs = phrases(text) | {run[i:i + n] for run in runs for i in range(len(run) - 3) for n in range(4, 20)}
    return {entry for sign in signs - tables.no_misspelling for entry in map(entry_of.get, spellings(sign)) if entry}


def spellings(entry, long=True):
    """Keys that other spellings share: no spaces, no doubled letters (these end in "+"), one letter less if long."""
    keys = {entry.replace("_", "") + "+", re.sub(r"(.)\1+", r"\1", entry) + "+"}
    return keys | {entry, *(entry[:i] + entry[i + 1:] for i, c in enumerate(entry) if c != "_")} if long else keys


def phrases(text):
    """The n-grams of one to three words, as the tables spell them. They cross commas but no "|"."""
    found = text.replace(",", "").split()
    return {"_".join(found[i:i + n]) for n in (1, 2, 3) for i in range(len(found) - n + 1)}


def shows_nudity(signs):
    """An explicit word or an artist known for nudes is enough; a suggestive word needs three signs in all."""
    suggestive = len(signs & tables.suggestive)
    hints = sum(bool(signs & hint) for hint in (tables.hint_person, tables.hint_pose, tables.hint_body))
    return bool(signs & (tables.naked | tables.nude_artists)) or suggestive > 0 and suggestive + hints >= 3


def shows_people(text, signs):
    people = tables.gendered | tables.people
    if not signs & tables.animals:
        people |= tables.gendered_unless_animal | tables.people_unless_animal
        if signs & {"face_of_a", "face_of_an"} and not signs & tables.things_with_a_face:
            return True  # a person's face, whatever the profession
    alone = patterns.before_thing.sub("|", text)  # "a police car" and "a nurse shark" show no one
    return bool(phrases(alone) & people or patterns.profession.search(alone))


def specifies_race(text):
    """As "a black judge", "an Asian software developer", "dark skin", "who is black", "a judge, asian, smiling" do."""
    plain = " ".join(text.replace(",", "").split())
    people = tables.gendered | tables.gendered_unless_animal | tables.people | tables.people_unless_animal
    near = " ".join(match["near"] for match in patterns.after_ethnicity.finditer(plain))
    specified = set(near.split()) & people - tables.pronouns or patterns.profession.search(near)
    return bool(specified or patterns.specifies_race.search(plain) or patterns.race_in_list.search(text))


def entries(words="", words_and_plurals=""):
    singular = words_and_plurals.split()
    return {*words.split(), *singular, *map(plural, singular)}


def plural(word):
    irregular = re.sub("(?<![aeiou])y$", "ies", re.sub("man$", "men", word))
    return irregular if irregular != word else word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def pattern(groups):
    """A regular expression for any line of the groups; {foods|vehicles} stands for any entry of these tables."""
    def any_entry(match):
        return "(%s)" % "|".join(sorted(set().union(*map(vars(tables).get, match[1].split("|"))))).replace("_", " ")

    lines = re.sub(r"\{([a-z_|]+)\}", any_entry, "\n".join(groups.values())).split("\n")
    return re.compile(r"\b(%s)\b" % "|".join(filter(None, lines)))


data = tomllib.loads(re.sub(r"(?m)^#.*", "", Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")))
groups, letters = data.pop("patterns"), data.pop("letters")
letters = {ord(symbol): letter for letter, symbols in letters.items() for symbol in symbols}
tables = SimpleNamespace(**{name: entries(**table) for name, table in data.items()})
patterns = SimpleNamespace(**{name: pattern(group) for name, group in groups.items()})
entry_of = {key: entry for entry in sorted(tables.blood | tables.undead | tables.naked)  # exceptions: the reverse
            for key in spellings(entry, (len(entry) > 5 and "_" not in entry) != (entry in tables.exceptions))}
