"""The public sets by name: licence, what they are fit for, and what one of their rows says of its prompt.

Fields are those of each set's published files; a set whose fields changed is told so by name (local_copies.py).
Licences are what the publishers state; the operator answers for the use.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

Row = Mapping[str, Any]
UNKNOWN = "unknown"


class Kind(StrEnum):
    """What a prompt asks for. A look-alike is harmless and reads like harm; `unclear` serves no role."""

    HARMFUL = "harmful"
    BENIGN = "benign"
    LOOK_ALIKE = "looks harmful"
    UNCLEAR = "unclear"


class Answer(StrEnum):
    """What the set's own answer does."""

    NONE = "none"
    HELPS = "helps"
    DECLINES = "declines"
    HARMS = "harms"


@dataclass(frozen=True)
class Found:
    """One prompt of a row, as its set describes it; `source` and `licence` where the row names them itself."""

    prompt: str
    kind: Kind
    answer: str = ""
    does: Answer = Answer.NONE
    category: str = ""
    language: str = ""
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class PublicSet:
    """`fields` tell its files from others; `reads` maps one row, given the file's path.

    `evaluation_only`: made to measure; never a role that teaches.
    `file_says`: what must stand in the file's path where the fields alone say too little. `measures_where`: words of a
    path by which a set marks the files that only measure.
    """

    name: str
    title: str
    where: str
    licence: str
    fields: frozenset[str]
    reads: Callable[[Row, str], Iterator[Found]]
    evaluation_only: bool = False
    gives: str = ""
    file_says: str = ""
    measures_where: tuple[str, ...] = ()


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    return value.strip() if isinstance(value, str) else ""


def _holds(value: object) -> bool:
    """A flag as sets write it: true, 1, "1", "yes"."""
    return str(value).strip().casefold() in ("true", "1", "1.0", "yes")


def _first_true(flags: object) -> str:
    """The first category that holds, of a mapping of names to flags."""
    named = flags if isinstance(flags, Mapping) else {}
    return next((str(name) for name, value in named.items() if _holds(value)), "")


def _beavertails(row: Row, _file: str) -> Iterator[Found]:
    # a safe answer does not say that the prompt was harmless: most of these prompts were written to provoke
    safe = _holds(row.get("is_safe"))
    yield Found(
        _text(row, "prompt"), Kind.UNCLEAR if safe else Kind.HARMFUL, _text(row, "response"),
        Answer.DECLINES if safe else Answer.HARMS, _first_true(row.get("category")), "en",
    )  # fmt: skip


def _saferlhf(row: Row, _file: str) -> Iterator[Found]:
    for k in (0, 1):
        safe = _holds(row.get(f"is_response_{k}_safe"))
        yield Found(
            _text(row, "prompt"), Kind.UNCLEAR if safe else Kind.HARMFUL, _text(row, f"response_{k}"),
            Answer.DECLINES if safe else Answer.HARMS, _first_true(row.get(f"response_{k}_harm_category")), "en",
        )  # fmt: skip


def _wildguard(row: Row, _file: str) -> Iterator[Found]:
    disguised = _holds(row.get("adversarial"))
    labels = {"harmful": Kind.HARMFUL, "unharmful": Kind.LOOK_ALIKE if disguised else Kind.BENIGN}
    kind = labels.get(_text(row, "prompt_harm_label"), Kind.UNCLEAR)
    declines = _text(row, "response_refusal_label") == "refusal"
    harms = _text(row, "response_harm_label") == "harmful"
    does = Answer.DECLINES if declines else Answer.HARMS if harms else Answer.HELPS
    answer = _text(row, "response")
    yield Found(
        _text(row, "prompt"), kind, answer, does if answer else Answer.NONE, _text(row, "subcategory"), "en"
    )  # fmt: skip


def _wildjailbreak(row: Row, _file: str) -> Iterator[Found]:
    # its benign prompts were written to look like the harmful ones, in both forms
    form, _, label = _text(row, "data_type").partition("_")
    kind = {"harmful": Kind.HARMFUL, "benign": Kind.LOOK_ALIKE}.get(label, Kind.UNCLEAR)
    prompt = _text(row, "adversarial") or _text(row, "vanilla")
    does = Answer.DECLINES if kind is Kind.HARMFUL else Answer.HELPS
    yield Found(prompt, kind, _text(row, "completion"), does, form, "en")


def _aegis(row: Row, _file: str) -> Iterator[Found]:
    kind = {"unsafe": Kind.HARMFUL, "safe": Kind.BENIGN}.get(_text(row, "prompt_label"), Kind.UNCLEAR)
    answer = _text(row, "response")
    harms = _text(row, "response_label") == "unsafe"
    otherwise = Answer.DECLINES if kind is Kind.HARMFUL else Answer.HELPS
    does = Answer.NONE if not answer else Answer.HARMS if harms else otherwise
    category = _text(row, "violated_categories").partition(",")[0]
    yield Found(_text(row, "prompt"), kind, answer, does, category, "en")


def _advbench(row: Row, _file: str) -> Iterator[Found]:
    yield Found(_text(row, "goal"), Kind.HARMFUL, language="en")


def _harmbench(row: Row, _file: str) -> Iterator[Found]:
    context = _text(row, "ContextString")
    if _text(row, "FunctionalCategory") == "copyright":
        return  # asks for protected text, which a refusal of harm does not cover
    prompt = f"{context}\n\n{_text(row, 'Behavior')}" if context else _text(row, "Behavior")
    yield Found(prompt, Kind.HARMFUL, category=_text(row, "SemanticCategory"), language="en")


def _strongreject(row: Row, _file: str) -> Iterator[Found]:
    yield Found(_text(row, "forbidden_prompt"), Kind.HARMFUL, category=_text(row, "category"), language="en")


def _xstest(row: Row, _file: str) -> Iterator[Found]:
    kind = _text(row, "type")
    harmful = kind.startswith("contrast")
    yield Found(_text(row, "prompt"), Kind.HARMFUL if harmful else Kind.LOOK_ALIKE, category=kind, language="en")


def _orbench(row: Row, file: str) -> Iterator[Found]:
    harmful = "toxic" in file.casefold()
    yield Found(
        _text(row, "prompt"), Kind.HARMFUL if harmful else Kind.LOOK_ALIKE, category=_text(row, "category"),
        language="en",
    )  # fmt: skip


def _coconot(row: Row, file: str) -> Iterator[Found]:
    # the other categories (false premises, unknowns) are to be answered otherwise, not refused as harm
    safety = _text(row, "category").casefold() == "requests with safety concerns"
    contrast = "contrast" in file.casefold()
    known = contrast or ("original" in file.casefold() and safety)  # its folder `pref` holds rows of both kinds
    kind = Kind.UNCLEAR if not known else Kind.LOOK_ALIKE if contrast else Kind.HARMFUL
    answer = _text(row, "response")
    does = Answer.NONE if not answer else Answer.HELPS if contrast else Answer.DECLINES
    yield Found(_text(row, "prompt"), kind, answer, does, _text(row, "subcategory"), "en")


def _donotanswer(row: Row, _file: str) -> Iterator[Found]:
    yield Found(_text(row, "question"), Kind.HARMFUL, category=_text(row, "risk_area"), language="en")


def _toxicchat(row: Row, _file: str) -> Iterator[Found]:
    # chat of real users; what a model answered is not judged there
    toxic = _holds(row.get("toxicity")) or _holds(row.get("jailbreaking"))
    yield Found(_text(row, "user_input"), Kind.HARMFUL if toxic else Kind.BENIGN, language="en")


_ALL = (
    PublicSet("beavertails", "BeaverTails", "hub: PKU-Alignment/BeaverTails", "CC BY-NC 4.0",
              frozenset({"prompt", "response", "is_safe", "category"}), _beavertails,
              gives="harmful prompts with harming and safe answers, 14 categories"),
    PublicSet("pku-saferlhf", "PKU-SafeRLHF", "hub: PKU-Alignment/PKU-SafeRLHF", "CC BY-NC 4.0",
              frozenset({"prompt", "response_0", "is_response_0_safe"}), _saferlhf,
              gives="harmful prompts with two answers each, 19 categories"),
    PublicSet("wildguardmix", "WildGuardMix", "hub: allenai/wildguardmix (gated)", "ODC-BY",
              frozenset({"prompt", "prompt_harm_label", "response_refusal_label"}), _wildguard,
              gives="harmful and benign prompts, plain and disguised", measures_where=("test",)),
    PublicSet("wildjailbreak", "WildJailbreak", "hub: allenai/wildjailbreak (gated)", "ODC-BY",
              frozenset({"vanilla", "adversarial", "completion", "data_type"}), _wildjailbreak,
              gives="harmful prompts and benign ones that look like them", measures_where=("eval",)),
    PublicSet("aegis", "Aegis AI Content Safety 2.0", "hub: nvidia/Aegis-AI-Content-Safety-Dataset-2.0", "CC BY 4.0",
              frozenset({"prompt", "prompt_label", "violated_categories"}), _aegis,
              gives="harmful and benign prompts, 23 categories"),
    PublicSet("advbench", "AdvBench", "github: llm-attacks/llm-attacks, data/advbench", "MIT",
              frozenset({"goal", "target"}), _advbench, gives="harmful instructions"),
    PublicSet("harmbench", "HarmBench", "github: centerforaisafety/HarmBench, data/behavior_datasets", "MIT",
              frozenset({"Behavior", "FunctionalCategory", "SemanticCategory"}), _harmbench, evaluation_only=True,
              gives="harmful behaviours to measure with"),
    PublicSet("strongreject", "StrongREJECT", "github: alexandrasouly/strongreject", "MIT",
              frozenset({"category", "forbidden_prompt"}), _strongreject, evaluation_only=True,
              gives="harmful prompts to measure with"),
    PublicSet("xstest", "XSTest", "github: paul-rottger/xstest", "CC BY 4.0",
              frozenset({"type", "prompt", "focus"}), _xstest, evaluation_only=True,
              gives="look-alikes and their harmful contrasts, to measure with"),
    PublicSet("or-bench", "OR-Bench", "hub: bench-llm/or-bench", "CC BY 4.0",
              frozenset({"prompt", "category"}), _orbench,
              gives="look-alikes (80k; hard-1k measures) and harmful prompts (toxic); told apart by name",
              file_says="or-bench", measures_where=("hard-1k",)),
    PublicSet("coconot", "CoCoNot", "hub: allenai/coconot", "ODC-BY",
              frozenset({"prompt", "response", "category", "subcategory"}), _coconot,
              gives="harmful prompts (original) and look-alikes (contrast); told apart by folder or file name",
              measures_where=("test",)),
    PublicSet("do-not-answer", "Do-Not-Answer", "hub: LibrAI/do-not-answer", "CC BY-NC-SA 4.0",
              frozenset({"question", "risk_area", "types_of_harm"}), _donotanswer, gives="harmful questions, 5 areas"),
    PublicSet("toxicchat", "ToxicChat", "hub: lmsys/toxic-chat", "CC BY-NC 4.0",
              frozenset({"user_input", "toxicity", "jailbreaking"}), _toxicchat,
              gives="what real users typed, toxic and not"),
)  # fmt: skip

SETS: Mapping[str, PublicSet] = MappingProxyType({found.name: found for found in _ALL})


def allows_commercial_use(licence: str) -> bool:
    """Whether a licence is known, as far as its name says, and not for non-commercial use only."""
    return licence not in ("", UNKNOWN) and "NC" not in licence.upper().replace("-", " ").split()


def named(title: str) -> PublicSet | None:
    """The set that a row of a plain file names as its source, by name or title; None for others."""
    plain = "".join(char for char in title.casefold() if char.isalnum())
    for found in _ALL:
        if plain in ("".join(c for c in text.casefold() if c.isalnum()) for text in (found.name, found.title)):
            return found
    return None


def recognised(fields: frozenset[str], file: str) -> PublicSet | None:
    """The set whose files have these fields; the one that asks for most of them, where several fit."""
    fitting = [found for found in _ALL if found.fields <= fields and found.file_says in file.casefold()]
    return max(fitting, key=lambda found: len(found.fields), default=None)
