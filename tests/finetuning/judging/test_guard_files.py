"""Guard files: each that ships reads a stand-in of its guard's output; a bad one is refused when it is read."""

import re
import traceback
from pathlib import Path

import pytest

from finetuning.judging import guard_file
from finetuning.judging.catalogue import guard_of, key_variables, label, parts_of, resolved, shipped
from finetuning.judging.guard_file import MOST_OUTPUT, has_verdict, load_guard_file, read_output
from finetuning.judging.guards import open_guard, open_judge
from finetuning.judging.judges import BadGuard, BatchJudge, Verdict
from tests.finetuning.judging.test_guards import MANY, bang_classifier
from tests.support.scripted_guard import scripted_guard

SIX = {
    "qwen3guard-gen-4b": "qwen", "wildguard": "allenai", "granite-guardian-3.1-2b": "ibm",
    "granite-guardian-3.3-8b": "ibm", "llama-guard-3-8b": "meta", "shieldgemma-2b": "google",
    "harmbench-llama-2-13b": "cais",
}  # fmt: skip
OWN = """
licence = "ours"
source = "./model"
[patterns]
unsafe = '^bad'
safe = '^good'
refusal = '^no$'
category = '^kind (\\w+)'
[[examples]]
prompt = "?"
answer = "!"
output = "bad\\nkind fire"
verdict = "unsafe"
refuses = false
category = "fire"
[[examples]]
prompt = "?"
answer = "."
output = "good\\nno"
verdict = "safe"
refuses = true
"""


def written(folder: Path, text: str = OWN, *, name: str = "own.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def opened(name: str, folder: Path) -> BatchJudge:
    """The guard that ships under that name, over a stand-in that writes the outputs of its file's own examples."""
    guard = guard_of(name)
    outputs = {example.verdict: example.output for example in guard.examples}
    source = scripted_guard(folder, {"!": outputs["unsafe"], "%": "Hm?"}, outputs["safe"])
    guard = guard.model_copy(update={"source": str(source), "new_tokens": 96})  # a stand-in's token is a byte
    return open_guard(guard, name, device="cpu", batch=2)


@pytest.mark.parametrize("name", SIX)
def test_a_shipped_guard_reads_a_stand_in_of_its_output(name: str, tmp_path: Path) -> None:
    judge = opened(name, tmp_path)
    patterns = guard_of(name).patterns
    says_refusals, says_category = bool(patterns and patterns.refusal), bool(patterns and patterns.category)
    answers = ["Do it so!", "Do it so.", "Sorry, I cannot help.", "Do it so%"]
    found = judge.verdicts(["Why?"] * 4, answers)
    category = next(e.category for e in guard_of(name).examples if e.verdict == "unsafe")
    assert bool(category) == says_category
    assert found == [
        Verdict(harmful=True, refuses=False, leaks=True, category=category),
        Verdict(harmful=False, refuses=says_refusals, leaks=False),
        Verdict(harmful=False, refuses=True, leaks=False),
        Verdict(harmful=True, refuses=False, leaks=True),  # neither safe nor unsafe: not cleared
    ]
    # of harmless prompts the guard is asked where it says refusals, the words where it does not
    assert judge.refusals(["Why?"] * 3, answers[:3]) == [False, says_refusals, True]
    assert judge.name == name


NONSENSE = {
    "qwen3guard-gen-4b": ("Safety: Safety unclear", "Safety: Safely no", "Safety: Safe or Unsafe"),
    "wildguard": ("Harmful response: not sure", "Harmful response: none", "Harmful response: no idea"),
    "granite-guardian-3.3-8b": ("<score> not sure </score>", "<score>No idea</score>", "No"),
    "llama-guard-3-8b": ("safely unknown", "safe or not, I cannot say", "It is safe"),
    "granite-guardian-3.1-2b": ("Hm?",), "shieldgemma-2b": ("Hm?",), "harmbench-llama-2-13b": ("Hm?",),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(shipped()) - {"beaver-dam-7b"}))  # its labels are no text
def test_nonsense_of_a_shipped_guard_counts_as_harm(name: str, tmp_path: Path) -> None:
    guard = guard_of(name)
    for output in NONSENSE[name]:
        if guard.patterns is not None:
            assert read_output(guard, output).harmful, output
        else:
            source = scripted_guard(tmp_path, {"%": output}, guard.examples[1].output)
            judge = open_guard(guard.model_copy(update={"source": str(source)}), name, device="cpu")
            assert judge.harmful(["Why?"] * 2, ["So%", "So."]) == [True, False]


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("qwen3guard-gen-4b", "Safety: Safe\nRefusal: Yesterday"),
        ("wildguard", "Harmful response: no\nResponse refusal: yesno"),
    ],
)  # fmt: skip
def test_a_refusal_is_no_part_of_another_word(name: str, output: str) -> None:
    assert read_output(guard_of(name), output).refuses is False


def test_a_word_that_only_begins_as_the_guards_word_is_not_it(tmp_path: Path) -> None:
    text = guard_text_of_words('output = "Not sure"')
    with pytest.raises(BadGuard, match="number 2: the output does not begin with the safe word No"):
        load_guard_file(written(tmp_path, text))
    load_guard_file(written(tmp_path, guard_text_of_words('output = "No, it is not"')))


def guard_text_of_words(safe: str, *, more: str = "", example: str = "") -> str:
    return f"""
licence = "ours"
source = "./model"
score = "first_token"
{more}
[words]
unsafe = "Yes"
safe = "No"
[[examples]]
prompt = "?"
answer = "!"
output = "Yes"
verdict = "unsafe"
{example}
[[examples]]
prompt = "?"
answer = "."
{safe}
verdict = "safe"
"""


LABELS = 'licence = "ours"\nsource = "./model"\nscore = "labels"\n'
URL = '[url]\nbase = "http://127.0.0.1:9/v1"\nmodel = "m"\n'
PAIR = '[[examples]]\nprompt = "?"\nanswer = "!"\noutput = "x"\nverdict = "safe"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (OWN.replace("[patterns]", "threshold = 0.7\n[patterns]"), "threshold: does nothing with score"),
        (OWN.replace("[patterns]", 'harmful_labels = ["a"]\n[patterns]'), "harmful_labels: do nothing without score"),
        (guard_text_of_words('output = "No"', more='harmful_labels = ["a"]'), "harmful_labels: do nothing without"),
        (guard_text_of_words('output = "No"', more="new_tokens = 8"), "new_tokens: does nothing without score"),
        (f"{LABELS}new_tokens = 8", "new_tokens: does nothing without score"),
        (f"{LABELS}[template_arguments]\nthink = false", "template_arguments: do nothing with score"),
        (f"{LABELS}{PAIR}", "examples: do nothing with score"),
        (OWN.replace('source = "./model"', "max_tokens = 512") + URL, "max_tokens: does nothing with [url]"),
        (guard_text_of_words('output = "No"', example="refuses = true"), "examples: refuses and category do nothing"),
        (guard_text_of_words('output = "No"', example='category = "a"'), "examples: refuses and category do nothing"),
    ],
)  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused_with_its_mend(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadGuard) as found:
        load_guard_file(written(tmp_path, text))
    assert words in str(found.value)
    assert re.search(r"leave (it|them) out|use url\.max_characters", str(found.value))


@pytest.mark.parametrize(
    "text",
    [
        f'{LABELS}threshold = 0.7\nharmful_labels = ["a"]\nmax_tokens = 512',
        guard_text_of_words('output = "No"', more="threshold = 0.7\nmax_tokens = 512"),
    ],
)
def test_options_that_do_something_are_taken(tmp_path: Path, text: str) -> None:
    assert load_guard_file(written(tmp_path, text)).threshold == 0.7


def test_beaver_dam_is_a_file_too(tmp_path: Path) -> None:
    source = bang_classifier(tmp_path, labels=MANY, kind="multi_label_classification")
    guard = guard_of("beaver-dam-7b").model_copy(update={"source": str(source), "threshold": 0.9})
    assert open_guard(guard, "beaver", device="cpu").harmful(["Why?"] * 2, ["{prompt} so!", "so"]) == [True, False]


def test_no_name_of_before_is_lost_and_every_file_says_its_licence() -> None:
    assert {"beaver-dam-7b", "llama-guard-3-8b", "granite-guardian-3.1-2b", *SIX} == set(shipped())
    assert all(guard_of(name).licence for name in shipped())
    assert parts_of("llama-guard-3-8b+refusal-marker") == ["llama-guard-3-8b", "refusal-marker"]


def test_an_operators_own_file_is_a_judge_by_its_path_and_joins_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    scripted_guard(tmp_path / "model", {"!": "bad\nkind fire"}, "good\nno")
    monkeypatch.chdir(tmp_path)
    name = resolved("own.toml+refusal-marker")
    assert name == f"{path}+refusal-marker"
    judge = open_judge(name, device="cpu")
    assert judge.name == label(name)
    assert judge.name.startswith("own@")
    assert str(tmp_path) not in judge.name
    (bad, good) = judge.verdicts(["?"] * 2, ["Sorry, I cannot help!", "So."])
    assert (bad.harmful, bad.category, good.harmful) == (True, "fire", True)
    assert judge.refusals(["?"] * 2, ["Sorry, I cannot help!", "So."]) == [True, True]
    before = label(name)
    written(tmp_path, OWN.replace("'^no$'", "'^no'"))
    assert label(name) != before, "an edited file is another judge"


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ("licence = ", "licence: ", "own.toml is no TOML"),
        ('licence = "ours"\n', "", "field licence: Field required"),
        ("'^bad'", "'^(bad'", "field patterns.unsafe: is no regular expression"),
        ("'^bad'", "'^worse'", "examples, number 1: neither patterns.unsafe nor patterns.safe matches its output"),
        ("'^good'", "'^fine'", "examples, number 2: neither"),
        ("'^good'", "'^(?:good|bad)'", None),  # unsafe outweighs safe
        ("'^bad'", "'^(?:good|bad)'", "examples, number 2: the patterns call its output unsafe, not safe"),
        ("'^no$'", "'^never$'", "examples, number 2: patterns.refusal gives refuses = False, the example says True"),
        ("(\\w+)", "(\\d+)", "examples, number 1: patterns.category gives '', the example says 'fire'"),
        ("safe = '^good'\n", "", "field patterns.safe: Field required"),
        ('verdict = "safe"', 'verdict = "unsafe"', "field examples: add one whose verdict is safe"),
        ("[patterns]", "api_key = 'sk-1'\n[patterns]", "field api_key: Extra inputs are not permitted"),
        ('source = "./model"\n', "", "give either source"),
        ("[patterns]", 'template = "{prompt}"\n[patterns]', "template: needs both {prompt} and {answer}"),
        ("[patterns]", 'score = "first_token"\n[patterns]', r"\[patterns\] unsafe and safe belong to"),
        ("[patterns]", "new_tokens = 0\n[patterns]", "field new_tokens: Input should be greater than or equal to 1"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_with_its_field(
    tmp_path: Path, was: str, now: str, words: str | None
) -> None:
    assert was in OWN
    path = written(tmp_path, OWN.replace(was, now, 1))
    if words is None:
        load_guard_file(path)
        return
    with pytest.raises(BadGuard, match=r"own\.toml") as found:
        parts_of(str(path))
    assert words.replace("\\", "") in str(found.value)


def test_a_pattern_that_no_example_shows_is_refused(tmp_path: Path) -> None:
    text = OWN.replace("refuses = true", "refuses = false").replace("good\\nno", "good\\nyes")
    with pytest.raises(BadGuard, match=r"field patterns.refusal: no example shows it"):
        load_guard_file(written(tmp_path, text))
    text = OWN.replace('category = "fire"', "").replace("\\nkind fire", "")
    with pytest.raises(BadGuard, match=r"field patterns.category: no example shows it"):
        load_guard_file(written(tmp_path, text))


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadGuard, match=r"nowhere.toml cannot be read \(No such file"):
        parts_of(str(tmp_path / "nowhere.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadGuard, match=r"bytes\.toml is no TOML"):
        parts_of(str(tmp_path / "bytes.toml"))
    written(tmp_path, "#" * 2**19, name="large.toml")
    with pytest.raises(BadGuard, match="is it a guard file"):
        parts_of(str(tmp_path / "large.toml"))


@pytest.mark.parametrize(
    ("variable", "words"),
    [("sk-secret-1", "NAME of an environment variable"), ("IMMUNOTUNE_API_KEY", "belongs to the service")],
)
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_repeated(
    tmp_path: Path, variable: str, words: str
) -> None:
    url = f'[url]\nbase = "http://127.0.0.1:9/v1"\nmodel = "m"\nkey_variable = "{variable}"\n'
    with pytest.raises(BadGuard, match=words) as found:
        load_guard_file(written(tmp_path, OWN.replace('source = "./model"\n', "") + url))
    assert variable not in "".join(traceback.format_exception(found.value)), "nor in what it was raised from"


@pytest.mark.parametrize("folder", ["c++", "a+b"])
def test_a_file_in_a_folder_with_a_plus_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    path = written(tmp_path / folder)
    monkeypatch.chdir(tmp_path / folder)
    for name in ("own.toml", "./own.toml", "refusal-marker+own.toml", str(path)):
        with pytest.raises(BadGuard, match=r"\+ joins judges; move the guard file to a path without it"):
            resolved(name)


def test_the_keys_of_all_guards_of_a_name_are_asked_for(tmp_path: Path) -> None:
    url = '[url]\nbase = "http://127.0.0.1:9/v1"\nmodel = "m"\nkey_variable = "GUARD_KEY"\n'
    path = written(tmp_path, OWN.replace('source = "./model"\n', "") + url)
    assert key_variables(f"refusal-marker+{path}") == ("GUARD_KEY",)
    assert key_variables("llama-guard-3-8b") == key_variables("") == ()


def test_an_output_that_says_neither_is_harm_and_one_that_says_both_too() -> None:
    guard = guard_of("llama-guard-3-8b")
    assert [read_output(guard, text).harmful for text in ("", "I think so", "safe", "safe\nunsafe\nS1")] == [
        True, True, False, True
    ]  # fmt: skip


def test_no_more_of_an_output_is_read_than_a_verdict_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may send a mebibyte, and a pattern may cost the square of it; what is not read clears nothing."""
    found, read = guard_file._found, []
    monkeypatch.setattr(guard_file, "_found", lambda pattern, text: (read.append(len(text)), found(pattern, text))[1])
    guard = guard_of("llama-guard-3-8b")
    assert has_verdict(guard, "safe" + "\n" * 2**20)
    assert read_output(guard, "safe" + "\n" * 2**20).harmful
    assert not read_output(guard, "safe" + "\n" * 100).harmful
    assert max(read) == MOST_OUTPUT <= 10_000


@pytest.mark.parametrize("name", sorted(shipped()))
def test_no_shipped_pattern_tries_every_line_for_all_that_follow(name: str) -> None:
    patterns = guard_of(name).patterns
    for pattern in patterns.model_dump().values() if patterns else ():
        assert not re.search(r"\^(\\s|\[\^|\.|\\W|\\D)", pattern), "such a repeat runs over lines: quadratic"


def test_the_guides_example_is_a_guard_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "guides" / "judges.md").read_text(encoding="utf-8")
    whole, url = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert load_guard_file(written(tmp_path, whole)).new_tokens == 32
    elsewhere = "\n".join(line for line in whole.splitlines() if not line.startswith(("source", "max_tokens")))
    assert load_guard_file(written(tmp_path, f"{elsewhere}\n{url}")).url is not None
