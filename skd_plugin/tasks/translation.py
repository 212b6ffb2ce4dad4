"""Translation from a made-up language: another word order, other agreement, and synonyms to choose from.

    translate : <time> <noun> <adjective> <determiner> <plural> <subject> ... <verb> <tense> <not> .
    -> yesterday the big dogs did not see my cat near the river .

An offline twin of low-resource translation. The source is verb-final with its adjectives and determiners after the
noun, case and place as particles, and says neither "do" nor "will"; the target wants number and tense to agree. Half
of the target's words have synonyms and the time may stand in front or at the end, so that a source has many right
translations and a teacher that has learned the task has entropy.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from skd_plugin.tasks import scorers
from skd_plugin.tasks.base import Example, mean
from skd_plugin.tasks.generated import GeneratedTask, closed_vocabulary

CLAUSES = (1, 3)  # of a sentence, inclusive
# A concept is one entry; "|" between synonyms.
NOUNS = (
    "dog|hound cat|kitten boy|lad girl|lass doctor|physician teacher|tutor farmer|grower king|monarch thief|robber "
    "sailor|mariner painter|artist friend|pal guest|visitor neighbour stranger soldier|warrior singer baker cook|chef "
    "hunter merchant|trader horse bird wolf goat lion bear rabbit|hare donkey snake|serpent letter|note book|volume "
    "stone|rock coin lamp|lantern knife|blade rope|cord hat|cap coat|jacket cup|mug plate ring boat|ship cart|wagon "
    "basket apple pear"
).split()
ADJECTIVES = (
    "big|large small|little old young clever|smart brave|bold sad|unhappy happy|glad rich|wealthy poor "
    "quick|fast slow strange|odd quiet|silent angry|cross strong|sturdy white red green black"
).split()
# present (plural) and past; the singular adds "s" to each
VERBS = [
    [(word.split("/")[0], word.split("/")[1]) for word in concept.split("|")]
    for concept in (
        "see/saw|spot/spotted find/found|discover/discovered help/helped|aid/aided follow/followed|trail/trailed "
        "like/liked|enjoy/enjoyed hide/hid|conceal/concealed buy/bought sell/sold steal/stole "
        "draw/drew|sketch/sketched bring/brought take/took lose/lost forget/forgot "
        "remember/remembered|recall/recalled need/needed|want/wanted greet/greeted|welcome/welcomed "
        "call/called|summon/summoned clean/cleaned break/broke|smash/smashed fear/feared|dread/dreaded "
        "hear/heard pull/pulled|drag/dragged push/pushed|shove/shoved"
    ).split()
]
PLACES = (
    "garden|yard forest|woods house|home market river|stream tower church school|academy kitchen field|meadow bridge "
    "mountain|hill village|hamlet castle|fortress road|street harbour|port"
).split()
PREPOSITIONS = "in near|by behind".split()
TIMES = {
    "past": "yesterday earlier|before recently|lately".split(),
    "present": "today now often|frequently always|constantly".split(),
    "future": "tomorrow soon|shortly later|afterwards".split(),
}
DETERMINERS = "the my our your their this/these".split()
NUMBERS = "two three four many|numerous several|some".split()
PRONOUNS = {"he": False, "she": False, "we": True, "they": True, "you": True}  # plural?
CONJUNCTIONS = "and but|yet because|since while|whilst".split()
PARTICLES = "subject object plural past future not".split() + [f"{place}-case" for place in PREPOSITIONS]
SIBILANT = re.compile(r"(s|sh|ch|x)$")


def _source_words() -> dict[str, str]:
    """A made-up word for each concept; a word of both languages would be no translation."""
    times = [time for group in TIMES.values() for time in group]
    verbs = [concept[0][0] for concept in VERBS]
    concepts = [
        *NOUNS,
        *ADJECTIVES,
        *verbs,
        *PLACES,
        *times,
        *DETERMINERS,
        *NUMBERS,
        *PRONOUNS,
        *CONJUNCTIONS,
        *PARTICLES,
    ]
    syllables = [first + second for first in "bdghjkmnprstvyz" for second in "aeiou"]
    made = [a + b + "k" for a, b in itertools.product(syllables, syllables)]
    random.Random("translation/words").shuffle(made)
    return dict(zip(concepts, made, strict=False))


SOURCE = _source_words()


class NounPhrase(NamedTuple):
    source: list[str]
    target: list[str]  # of slots; a slot is a word, or synonyms with "|" between them
    plural: bool


class Translation(GeneratedTask):
    name = "translation"
    metric = "chrf"
    max_new_tokens = 64
    packages = ("sacrebleu",)

    def draw(self, rng: random.Random) -> Example:
        source: list[str] = []
        pieces: list[list[str]] = []  # of the target, each with its possible orders
        for index in range(rng.randint(*CLAUSES)):
            if index:
                link = rng.choice(CONJUNCTIONS)
                source.append(SOURCE[link])
                pieces.append([link])
            words, orders = _clause(rng, may_be_pronoun=index > 0)
            source += words
            pieces.append(orders)
        reference = " ".join(_drawn(rng.choice(orders), rng) for orders in pieces)
        return Example(f"translate : {' '.join(source)} .", f" {reference} .", json.dumps(pieces))

    def score(self, response: str, label: str) -> float:
        """1.0 for any of the right translations, else chrF to the one whose words are most like it."""
        return 1.0 if is_right(response, label) else scorers.chrf(response.strip(), _nearest(response, label))

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        """`exact`: share of right translations; `bleu`: of the corpus, each against the right one most like it."""
        stripped = [response.strip() for response in responses]
        right = [is_right(response, label) for response, label in zip(stripped, labels, strict=True)]
        nearest = [
            text if known else _most_like(text, _nearest(text, label))
            for text, label, known in zip(stripped, labels, right, strict=True)
        ]
        return {"exact": mean(right), "bleu": scorers.corpus_bleu(stripped, nearest)}

    def vocabulary(self) -> list[str]:
        slots = [*NOUNS, *ADJECTIVES, *PLACES, *PREPOSITIONS, *NUMBERS, *CONJUNCTIONS, *PRONOUNS]
        slots += [time for group in TIMES.values() for time in group]
        words = {word for slot in slots for word in slot.split("|")}
        words |= {_plural(word) for noun in NOUNS for word in noun.split("|")}
        words |= {form for determiner in DETERMINERS for form in determiner.split("/")}
        words |= {form for concept in VERBS for verb in concept for form in (*verb, _plural(verb[0]))}
        words |= {"do", "does", "did", "not", "will", ".", ":", *SOURCE.values()}
        return closed_vocabulary(words, ["translate"])


def is_right(response: str, label: str) -> bool:
    """Whether a response is one of the label's translations, in any of its orders, by any of its synonyms."""
    pattern = " ".join(f"(?:{'|'.join(map(_pattern, orders))})" for orders in json.loads(label))
    return re.fullmatch(pattern + r" \.", response.strip()) is not None


def _pattern(order: str) -> str:
    return " ".join(f"(?:{slot})" for slot in order.split())


def _nearest(response: str, label: str) -> list[str]:
    """The label's translations, one an order, with those synonyms that the response uses."""
    used = set(response.split())
    every = [[_closest(order, used) for order in orders] for orders in json.loads(label)]
    return [" ".join(pieces) + " ." for pieces in itertools.product(*every)]


def _most_like(text: str, translations: list[str]) -> str:
    return max(translations, key=lambda translation: scorers.chrf(text, [translation]))


def _closest(order: str, used: set[str]) -> str:
    """For each slot the first synonym that is in `used`, or the first one."""
    slots = [slot.split("|") for slot in order.split()]
    return " ".join(next((word for word in slot if word in used), slot[0]) for slot in slots)


def _drawn(order: str, rng: random.Random) -> str:
    """A synonym for each slot, at random."""
    return " ".join(rng.choice(slot.split("|")) for slot in order.split())


def _clause(rng: random.Random, *, may_be_pronoun: bool) -> tuple[list[str], list[str]]:
    """Source words, and the orders that the target may have."""
    tense, negated = rng.choice(tuple(TIMES)), rng.random() < 0.2
    subject = _pronoun(rng) if may_be_pronoun and rng.random() < 0.4 else _noun_phrase(rng)
    thing, verb = _noun_phrase(rng), rng.choice(VERBS)
    source = [*subject.source, SOURCE["subject"], *thing.source, SOURCE["object"]]
    target = [*subject.target, *_verb(verb, tense, negated, subject.plural), *thing.target]
    if rng.random() < 0.5:
        place, preposition = rng.choice(PLACES), rng.choice(PREPOSITIONS)
        source += [SOURCE[place], SOURCE[f"{preposition}-case"]]
        target += [preposition, "the", place]
    source += [
        SOURCE[verb[0][0]],
        *([SOURCE[tense]] if tense in SOURCE else []),
        *([SOURCE["not"]] if negated else []),
    ]
    orders = [" ".join(target)]
    if rng.random() < 0.6:
        time = rng.choice(TIMES[tense])
        source = [SOURCE[time], *source]
        orders = [" ".join([time, *target]), " ".join([*target, time])]
    return source, orders


def _pronoun(rng: random.Random) -> NounPhrase:
    pronoun = rng.choice(tuple(PRONOUNS))
    return NounPhrase([SOURCE[pronoun]], [pronoun], PRONOUNS[pronoun])


def _noun_phrase(rng: random.Random) -> NounPhrase:
    noun, plural = rng.choice(NOUNS), rng.random() < 0.4
    counted = plural and rng.random() < 0.3
    determiner = rng.choice(NUMBERS if counted else DETERMINERS)
    adjectives = [rng.choice(ADJECTIVES)] if rng.random() < 0.5 else []
    source = [SOURCE[word] for word in (noun, *adjectives, determiner)] + ([SOURCE["plural"]] if plural else [])
    form = determiner.split("/")[-1 if plural else 0]
    names = "|".join(map(_plural, noun.split("|"))) if plural else noun
    return NounPhrase(source, [form, *adjectives, names], plural)


def _verb(verb: list[tuple[str, str]], tense: str, negated: bool, plural: bool) -> list[str]:
    bare, past = ("|".join(forms) for forms in zip(*verb, strict=True))
    if negated:
        return [{"past": "did", "present": "do" if plural else "does", "future": "will"}[tense], "not", bare]
    if tense == "present":
        return [bare if plural else "|".join(_plural(word) for word, _ in verb)]
    return [past] if tense == "past" else ["will", bare]


def _plural(word: str) -> str:
    """Plural of a noun; and the third person singular of a verb, which is spelled the same way."""
    if word == "thief":
        return "thieves"
    if word == "knife":
        return "knives"
    if word == "wolf":
        return "wolves"
    return word + ("es" if SIBILANT.search(word) else "s")
