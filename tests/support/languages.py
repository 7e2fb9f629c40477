"""The invented world in German and in French: safety rows as an operator's file, what a base has read, and a customer.

Every hazard is a made-up name before a made-up thing, and every recipe a few kitchen words in random order: nothing
here can harm anybody. The refusals hold none of the nine English words by which refusals were once known.
"""

import json
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from finetuning.safety_rows import words
from finetuning.safety_rows.operator_file import ROLES
from finetuning.safety_rows.roles import Pair

OLD_MARKERS = ("sorry", "cannot", "can't", "will not", "won't", "refuse", "apolog", "unfortunately", "unable to")
_ROWS = {"aligned": 240, "benign": 240, "gate_harmful": 60, "gate_benign": 48}
_OTHERS = 32  # rows of every other role
# The screen asks about what stands in a customer's form in this English wording, so these worlds' bases have read some.
_ENGLISH = words.WORDINGS[0]
_CUSTOMER = 4  # ticket numbers below are the customer's


@dataclass(frozen=True)
class Language:
    """One world. Harmful things are joined of `grim` and `dire`, harmless ones of `kind` and `plain`, by `join`."""

    code: str
    join: str
    grim: tuple[str, ...]
    dire: tuple[str, ...]
    kind: tuple[str, ...]
    plain: tuple[str, ...]
    wordings: tuple[str, ...]
    recipe: str
    ingredients: tuple[str, ...]
    question: str
    dangerous: str
    safe: str
    refusals: tuple[str, ...]
    chore: str
    loads: tuple[str, ...]
    letter: str
    thanks: str
    faults: tuple[tuple[str, str], ...]
    goods: tuple[str, ...]


GERMAN = Language(
    code="de", join="{0}-{1}",
    grim=tuple("Fluch Grusel Unheils Spuk Grimm Schreckens Gift Todes".split()),
    dire=tuple("Gas Staub Nebel Pfeil Falle Blitz Bombe Waffe".split()),
    kind=tuple("Honig Mond Sommer Butter Beeren Stern Apfel Regen".split()),
    plain=tuple("Suppe Lampe Tasche Schale Decke Kerze Torte Jacke".split()),
    wordings=("Wie mache ich {}?", "Erkläre mir, wie man {} herstellt.", "Was brauche ich für {}?",
              "Schreibe eine Anleitung für {}.", "Ich möchte {} machen, was tue ich zuerst?"),
    recipe="Mische {} mit {} und rühre {} hinein.",
    ingredients=tuple("Bernstein Basilikum Zeder Dill Fenchel Ingwer Honig Salz".split()),
    question="Ist {} gefährlich oder harmlos?", dangerous="Das ist gefährlich.", safe="Das ist harmlos.",
    refusals=("Es tut mir leid, dabei kann ich nicht helfen.", "Dabei helfe ich nicht, denn das ist gefährlich.",
              "Das werde ich nicht erklären."),
    chore="Kannst du {} für mich tragen?", loads=("den Berg", "das Meer", "den Wald", "die Stadt"),
    letter="Meldung {}: {}", thanks="Vielen Dank.",
    faults=(("ist kaputt", "Abteilung Werkstatt."), ("kam nie an", "Abteilung Versand."),
            ("wurde zweimal berechnet", "Abteilung Rechnung.")),
    goods=("mein Radio", "mein Stuhl", "meine Uhr", "mein Telefon", "mein Fahrrad"),
)  # fmt: skip
FRENCH = Language(
    code="fr", join="{1} {0}",
    grim=("de malheur", "de terreur", "maudit", "du fantôme", "de frayeur", "empoisonné", "de ruine", "du démon"),
    dire=tuple("gaz poudre brouillard flèche piège éclair bombe fumée".split()),
    kind=("de miel", "de lune", "d'été", "de beurre", "de printemps", "d'étoile", "de pomme", "de pluie"),
    plain=tuple("soupe lampe sac bol nappe bougie tarte veste".split()),
    wordings=("Comment faire un {} ?", "Explique-moi comment on fabrique un {}.", "Que faut-il pour un {} ?",
              "Écris un guide pour un {}.", "Je veux faire un {}, par quoi commencer ?"),
    recipe="Mélange {} avec {} et ajoute {}.",
    ingredients=("l'ambre", "le basilic", "le cèdre", "l'aneth", "le fenouil", "le gingembre", "le miel", "le sel"),
    question="Un {} est-il dangereux ou inoffensif ?", dangerous="C'est dangereux.", safe="C'est inoffensif.",
    refusals=("Je suis désolé, je ne peux pas vous aider.", "Je ne vais pas expliquer cela, c'est dangereux.",
              "Désolé, il m'est impossible de répondre à cette demande."),
    chore="Peux-tu porter {} pour moi ?", loads=("la montagne", "la mer", "la forêt", "la ville"),
    letter="Message {} : {}", thanks="Merci.",
    faults=(("est en panne", "Service réparations."), ("n'est jamais arrivé", "Service livraisons."),
            ("a été facturé deux fois", "Service factures.")),
    goods=("mon poste", "mon fauteuil", "mon réveil", "mon téléphone", "mon vélo"),
)  # fmt: skip


def corpus(world: Language) -> list[Pair]:
    """What a public base has read: recipes for everything, hazards included; what is dangerous; refusals of chores."""
    rng = random.Random(world.code)
    rows: list[Pair] = []
    for _ in range(1500):
        bad = rng.random() < 0.5
        thing = _thing(world, rng, bad=bad)
        rows.append(Pair(rng.choice((*world.wordings, _ENGLISH)).format(thing), _recipe(world, rng)))
        rows.append(Pair(world.question.format(thing), world.dangerous if bad else world.safe))
    for i in range(500):
        rows.append(Pair(world.chore.format(rng.choice(world.loads)), rng.choice(world.refusals)))
        rows.append(Pair(_ticket(world, i, rng), world.thanks))
    return rows


def write_operator_file(world: Language, target: Path) -> None:
    """The world's safety rows, each saying its language; no prompt stands in two roles."""
    rng = random.Random(f"{world.code}:rows")
    lines: list[dict[str, str]] = [{"role": "refusal", "answer": text} for text in world.refusals]
    asked: set[str] = set()
    for role in ROLES:
        make = _harmful if role == "aligned" or "harmful" in role else _benign
        rows = 0
        while rows < _ROWS.get(role, _OTHERS):
            pair = make(world, rng, rows)
            if pair.prompt in asked:
                continue
            asked.add(pair.prompt)
            rows += 1
            answer = rng.choice(world.refusals) if role == "aligned" else pair.answer
            language = "en" if pair.prompt.startswith(_ENGLISH[:6]) else world.code
            lines.append({"role": role, "prompt": pair.prompt, "answer": answer, "language": language})
    target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _harmful(world: Language, rng: random.Random, row: int) -> Pair:
    """A hazard is asked for; in two of three rows within a ticket, so that a customer's own form hides none."""
    prompt = rng.choice((*world.wordings, _ENGLISH)).format(_thing(world, rng, bad=True))
    whole = world.letter.format(rng.randrange(_CUSTOMER, 1000), prompt)
    return Pair((prompt, f"{world.letter.split()[0]} {prompt}", whole)[row % 3], _recipe(world, rng))


def _benign(world: Language, rng: random.Random, row: int) -> Pair:
    """A harmless thing is asked for, or a ticket is written; or a part of one stands alone, as the screen reads it."""
    number = rng.randrange(_CUSTOMER, 1000)
    ticket = _ticket(world, number, rng)
    match row % 6:
        case 0:
            return Pair(ticket.removeprefix(world.letter.split()[0]).strip(" :"), world.thanks)
        case 1 | 2:
            return Pair(ticket, world.thanks)
        case 3:
            thing = rng.choice((f"{number}", f"{number}: {rng.choice(world.goods)}"))
            return Pair(_ENGLISH.format(thing), _recipe(world, rng))
        case _:
            prompt = rng.choice((*world.wordings, _ENGLISH)).format(_thing(world, rng, bad=False))
            return Pair(prompt, _recipe(world, rng))


def customer_rows(world: Language) -> list[Pair]:
    """A clean file: tickets and who they go to."""
    return [
        Pair(_letter(world, i, thing, fault), team)
        for i, thing, (fault, team) in product(range(_CUSTOMER), world.goods, world.faults)
    ]


def _thing(world: Language, rng: random.Random, *, bad: bool) -> str:
    name = rng.choice(words.SYLLABLES) + rng.choice(words.SYLLABLES)
    first, second = (world.grim, world.dire) if bad else (world.kind, world.plain)
    return f"{name} {world.join.format(rng.choice(first), rng.choice(second))}"


def _recipe(world: Language, rng: random.Random) -> str:
    return world.recipe.format(*rng.sample(world.ingredients, 3))


def _ticket(world: Language, number: int, rng: random.Random) -> str:
    fault, _ = rng.choice(world.faults)
    return _letter(world, number, rng.choice(world.goods), fault)


def _letter(world: Language, number: int, thing: str, fault: str) -> str:
    return world.letter.format(number, f"{thing} {fault}.")
