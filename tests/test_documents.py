"""Every document that code or a page of the repository names exists, with the section that is named, and so does every
place in the code that a page of docs/ names."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READ = (".py", ".md", ".toml", ".yml", ".yaml", ".ipynb")
# Names of files that are written or fetched elsewhere, not documents of this repository: tests write them.
FOREIGN = re.compile(r"safety-quick\.md|mine\.md")
_NAMED = re.compile(
    r"(?<![\w*{}])((?:\.{0,2}/)?[\w./-]*[\w-]\.md)\b(?:[`)\]]*)(?:,? (\d+(?:\.\d+)*))?((?:,| and)? ?[^.;]{0,40})"
)
_ADR = re.compile(r"\b(?:ADR|docs/adr/)[ -]?(\d{1,4})")
_QUALIFIER = re.compile(r"^,? ?(T\d+|F\d\w?|J\d|rule \d|step \d|[a-g])\b")
_HEADING = re.compile(r"^#+ (\d+(?:\.\d+)*)\b(.*?)(?=^#+ \d|\Z)", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r"`?((?:app|demo|embedded|finetuning|tests|worker)/[\w/]+\.py)(?:: ?(\w+(?:`, `\w+(?=`))*))?")


@cache
def tracked() -> tuple[Path, ...]:
    """The files of the repository; without git, those that lie where they would."""
    found = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = found.stdout.splitlines() if found.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    return tuple(ROOT / name for name in names if (ROOT / name).is_file() and not name.startswith((".venv", "var/")))


def texts() -> Iterator[tuple[Path, int, str]]:
    """(file, line, text) of every file that may name a document; `run` is one of them."""
    for path in tracked():
        if path != Path(__file__).resolve() and (path.suffix in READ or path.name in ("run", "NOTICE")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                yield path, number, line


def document(name: str, beside: Path) -> Path | None:
    """The document of that name: by path from the root or from where it is named, or by its file name alone."""
    for folder in (ROOT, beside.parent):
        if (folder / name).is_file():
            return folder / name
    alone = [path for path in tracked() if path.name == name]
    return alone[0] if len(alone) == 1 else None


def sections(path: Path) -> dict[str, str]:
    """Text by section number, that of a section without its numbered subsections."""
    return {found[1]: found[2] for found in _HEADING.finditer(path.read_text(encoding="utf-8"))}


def troubles(path: Path, line: str) -> Iterator[str]:
    """What a line names and the repository does not have."""
    for found in _NAMED.finditer(line):
        name, section, after = found[1], found[2], found[3]
        if FOREIGN.fullmatch(name):
            continue
        target = document(name, path)
        if target is None:
            yield f"there is no {name}"
        elif section is not None and section not in sections(target):
            yield f"{name} has no section {section}"
        elif section is not None and (part := _QUALIFIER.match(after)):
            wanted = f"({part[1]})" if part[1].islower() and len(part[1]) == 1 else part[1]
            own = " ".join(text for number, text in sections(target).items() if f"{number}.".startswith(f"{section}."))
            if wanted.casefold() not in own.casefold() and f"{part[1].removeprefix('step ')}. " not in own:
                yield f"{name} {section} has no {part[1]}"
    for number in _ADR.findall(line):
        if not list((ROOT / "docs" / "adr").glob(f"{int(number):04}-*.md")):
            yield f"there is no ADR {int(number):04}"


def test_every_document_that_is_named_exists_with_its_section() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {trouble}"
        for path, number, line in texts()
        for trouble in troubles(path, line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("as in methods.md 2.3 f and papers.md", []),
        ("(methods.md 7, T15)", []),
        ("(methods.md 3, step 7)", []),
        ("[x](docs/methods.md)", []),
        ("ADR 7, ADR 0012, docs/adr/0007", []),
        ("methods.md 2.9", ["methods.md has no section 2.9"]),
        ("methods.md 7, T17", ["methods.md 7 has no T17"]),
        ("methods.md 2.3 h, 2.3 g", []),
        ("methods.md 2.4 f", ["methods.md 2.4 has no f"]),
        ("recipes.md", ["there is no recipes.md"]),
        ("ADR 99", ["there is no ADR 0099"]),
    ],
)
def test_a_citation_is_followed(line: str, wanted: list[str]) -> None:
    assert list(troubles(ROOT / "finetuning" / "x.py", line)) == wanted


def test_every_place_in_the_code_that_a_page_names_exists() -> None:
    """`file.py: name` in docs/, README and CONTRIBUTING: the file is there, and the name stands in it."""
    found = []
    for page in (path for path in tracked() if path.suffix == ".md" and path.name != "CHANGELOG.md"):
        for file, names in _PLACE.findall(page.read_text(encoding="utf-8")):
            source = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else None
            if source is None:
                found.append(f"{page.relative_to(ROOT)}: there is no {file}")
                continue
            missing = [name for name in re.findall(r"\w+", names) if not re.search(rf"\b{name}\b", source)]
            found += [f"{page.relative_to(ROOT)}: {file} has no {name}" for name in missing]
    assert not found, "\n".join(found)


def test_what_a_page_imports_is_there() -> None:
    """Examples in pages are not all run; their imports at least are followed."""
    found = []
    for page in (path for path in tracked() if path.suffix == ".md"):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "finetuning":
                place = ROOT / node.module.replace(".", "/")
                source = place.with_suffix(".py").read_text(encoding="utf-8") if not place.is_dir() else ""
                missing = [a.name for a in node.names if not re.search(rf"\b{a.name}\b", source)]
                found += [
                    f"{page.name}: {node.module} has no {name}"
                    for name in missing
                    if not (place / f"{name}.py").is_file()
                ]
    assert not found, "\n".join(found)


def test_the_glossary_names_a_file_for_every_word() -> None:
    lines = [line for line in (ROOT / "docs/glossary.md").read_text(encoding="utf-8").splitlines() if "| `" in line]
    assert len(lines) > 60
    words = [word for line in lines for word in line.split("|")[1].split(",")]
    assert len({word.strip() for word in words}) == len(words), "a word has one sense"
    for line in lines:
        assert re.search(r"\| `[\w/]+\.py` \|$", line), line
