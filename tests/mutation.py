"""Mutation run over finetuning/defences/: break one thing at a time and ask whether a test notices.

    python -m tests.mutation [--file antidote] [--jobs 1] [--limit 20] [--again]

Works on trees of the tree in a temporary folder, never on the tree itself. Results go to docs/results/mutation.json;
a mutant of an unchanged source that was killed is not run again unless `--again` asks for it, a survivor always is.
"""

import argparse
import ast
import copy
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path("finetuning/defences")
TESTS = Path("tests/finetuning")
RESULTS = ROOT / "docs/results/mutation.json"
# Tests of a defence beside its own file, which always runs first.
MORE_TESTS: Mapping[str, Sequence[str]] = {
    "antibody_align": ("defences/test_joint.py", "defences/test_booster.py"),
    "vaccine": ("defences/test_joint.py",),
    "antidote": ("test_invariants.py", "model/test_lora_coordinates.py"),
    "antibody": ("test_invariants.py",),
    "screen_weights": ("test_invariants.py", "defences/test_antibody.py"),
    "anchored": ("test_invariants.py",),
    "plain": ("test_invariants.py", "defences/test_vaccine.py"),
}
# Third parties that every test imports: loaded once, before the processes are forked.
PRELOADED = (
    "pytest", "pytest_timeout", "torch", "peft", "hypothesis", "safetensors.torch", "tokenizers", "pydantic.main",
    "transformers", "transformers.models.llama.modeling_llama", "transformers.models.opt.modeling_opt",
)  # fmt: skip
# Without the plugins that only cost time here; of the others' names pytest's own reader of options wants `timeout`.
OPTIONS = (
    "-x", "-q", "--noconftest", "--assert=plain", "--disable-plugin-autoload", "-p", "pytest_timeout",
    "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception",
)  # fmt: skip
SURVIVED, KILLED, LATE, FOREIGN = 0, 1, 2, 97

Change = Callable[[Any], ast.AST]


@dataclass(frozen=True)
class Mutant:
    """One broken copy of a module: where, what was there, what stands there now, and the whole source."""

    module: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """A name that stays while the module's source does."""
        return hashlib.blake2b(f"{self.module}{self.source}".encode(), digest_size=8).hexdigest()


# --- what is broken --------------------------------------------------------------------------------------------------

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmax": "argmin", "any": "all", "all": "any"}
_DROPPED = {"detach", "clone", "abs", "sqrt", "square"}
_DELETED = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Continue, ast.Break)
_SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "type_params", "ctx"}


def changes(node: ast.AST, *, inside: bool) -> Iterator[tuple[str, Change]]:
    """Every way to break this node; `inside` a function statements are deleted too."""
    if inside and isinstance(node, _DELETED):
        yield "delete", lambda _: ast.Pass()
    yield from _logic(node)
    yield from _values(node)


def _logic(node: ast.AST) -> Iterator[tuple[str, Change]]:
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _OPERATORS:
            yield "operator", lambda n: _with(n, op=_OPERATORS[type(n.op)]())
        case ast.BoolOp():
            yield "operator", lambda n: _with(n, op=_OPERATORS[type(n.op)]())
        case ast.Compare(ops=[op]) if type(op) in _OPERATORS:
            yield "comparison", lambda n: _with(n, ops=[_OPERATORS[type(n.ops[0])]()])
        case ast.If() | ast.IfExp() | ast.While():
            yield "not", lambda n: _with(n, test=ast.UnaryOp(ast.Not(), n.test))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "unary", lambda n: n.operand
        case _:
            pass


def _values(node: ast.AST) -> Iterator[tuple[str, Change]]:
    match node:
        case ast.Constant(value=bool()):
            yield "constant", lambda n: _with(n, value=not n.value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", lambda n: _with(n, value=n.value + 1)
            if value not in {0, 1}:
                yield "constant", lambda n: _with(n, value=type(n.value)(0))
        case ast.Name() | ast.Attribute() | ast.keyword():
            field = {"Name": "id", "Attribute": "attr", "keyword": "arg"}[type(node).__name__]
            if getattr(node, field) in _NAMES:
                yield "swap", lambda n: _with(n, **{field: _NAMES[getattr(n, field)]})
        case ast.Call(func=ast.Attribute(attr=name), args=[]) if name in _DROPPED:
            yield "drop", lambda n: n.func.value
        case _:
            pass


def _with(node: Any, **fields: Any) -> ast.AST:
    for name, value in fields.items():
        setattr(node, name, value)
    changed: ast.AST = node
    return changed


@dataclass(frozen=True)
class _Place:
    """A node, and the field (and index) of its parent that holds it."""

    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None
    inside: bool

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def _places(parent: ast.AST, *, inside: bool = False) -> Iterator[_Place]:
    """All nodes that act: no docstrings, annotations, decorators, assertions, texts of messages or `strict=True`."""
    inside = inside or isinstance(parent, ast.FunctionDef | ast.Lambda)
    for field, value in ast.iter_fields(parent):
        if field in _SKIPPED_FIELDS or (isinstance(parent, ast.keyword) and parent.arg == "strict"):
            continue
        several = isinstance(value, list)
        for index, node in enumerate(value if several else [value]):
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not isinstance(node, ast.AST) or text or isinstance(node, ast.JoinedStr | ast.Assert):
                continue
            yield _Place(node, parent, field, index if several else None, inside)
            yield from _places(node, inside=inside)


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a module, in the order of its lines; none equals the module or another one."""
    tree = ast.parse(source)
    bound = Counter(ast.unparse(target) for node in ast.walk(tree) for target in _targets(node))
    seen = {ast.unparse(tree)}
    for place in _places(tree):
        for kind, change in changes(place.node, inside=place.inside):
            if _says_nothing(place, kind, bound):
                continue
            changed = ast.fix_missing_locations(change(copy.deepcopy(place.node)))
            place.put(changed)
            broken = ast.unparse(tree)
            place.put(place.node)
            if broken not in seen:
                seen.add(broken)
                line = getattr(place.node, "lineno", 0)
                yield Mutant(module, line, kind, _short(place.node), _short(changed), broken)


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.For | ast.comprehension | ast.AugAssign | ast.AnnAssign) else []


def _says_nothing(place: _Place, kind: str, bound: Mapping[str, int]) -> bool:
    """Deleting a name's only binding fails in any test that comes by; float() detaches by itself."""
    if kind == "delete" and isinstance(place.node, ast.Assign):
        return all(bound[ast.unparse(target)] == 1 for target in place.node.targets)
    return kind == "drop" and isinstance(place.parent, ast.Call) and ast.unparse(place.parent.func) == "float"


def _short(node: ast.AST) -> str:
    text = ast.unparse(node).splitlines()[0]
    return text if len(text) <= 100 else text[:97] + "..."


# --- whether a test notices ------------------------------------------------------------------------------------------


def tests_of(module: str) -> list[str]:
    """The test files of a defence, its own first."""
    return [str(TESTS / f"defences/test_{module}.py"), *(str(TESTS / name) for name in MORE_TESTS.get(module, ()))]


def _run_tests(tree: Path, paths: Sequence[str]) -> None:
    """In a forked process: run the tests of the copy, and leave with 0 if all pass."""
    import pytest

    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in {"", str(ROOT)})]
    for name in [name for name in sys.modules if name.split(".")[0] in {"tests", "finetuning"}]:
        del sys.modules[name]
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    code = pytest.main([*OPTIONS, *paths])
    own = Path(str(sys.modules["finetuning.defences"].__file__)) if "finetuning.defences" in sys.modules else tree
    # A run that tested the working tree instead of the copy would prove nothing.
    os._exit(int(code != 0) if own.is_relative_to(tree) else FOREIGN)


class TreeCopy:
    """A copy of the tree in which one mutant at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self._tree = folder
        for name in ("finetuning", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        self._process: BaseProcess | None = None
        self._deadline = 0.0
        self.mutant: Mutant | None = None

    def start(self, mutant: Mutant, limit: float) -> None:
        """Begin to run the tests on this mutant."""
        file = self._tree / SOURCES / f"{mutant.module}.py"
        file.write_text(mutant.source, encoding="utf-8")
        # Two mutants of one size in one second look alike to the cache of compiled modules.
        shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)
        self.mutant, self._deadline = mutant, time.monotonic() + limit
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_run_tests, args=(self._tree, tests_of(mutant.module)))
        self._process.start()

    def wait(self, seconds: float) -> int | None:
        """The outcome, or None while the tests still run. Puts the module back when they are done."""
        assert self._process is not None
        assert self.mutant is not None
        self._process.join(seconds)
        late = self._process.is_alive() and time.monotonic() > self._deadline
        if self._process.is_alive() and not late:
            return None
        if late:
            self._process.kill()
            self._process.join()
        code = LATE if late else self._process.exitcode
        name = SOURCES / f"{self.mutant.module}.py"
        shutil.copy(ROOT / name, self._tree / name)
        self.mutant = None
        if code == FOREIGN:
            raise SystemExit("the tests ran on the working tree, not on the copy")
        return SURVIVED if code == 0 else KILLED


def limits(tree: TreeCopy, modules: Sequence[str]) -> dict[str, float]:
    """Seconds that the tests of each module may take: four times what they take unbroken. Exits if they fail."""
    out: dict[str, float] = {}
    for module in modules:
        source = ast.unparse(ast.parse((ROOT / SOURCES / f"{module}.py").read_text(encoding="utf-8")))
        began = time.monotonic()
        tree.start(Mutant(module, 0, "none", "", "", source), 600)
        while (code := tree.wait(1.0)) is None:
            pass
        if code != SURVIVED:
            raise SystemExit(f"the tests of {module} fail without any mutant")
        out[module] = 30 + 4 * (time.monotonic() - began)
        _say(f"{module}: its tests pass in {time.monotonic() - began:.0f} s")
    return out


def run(wanted: Sequence[Mutant], jobs: int, done: Callable[[Mutant, bool], None]) -> None:
    """Try every mutant, `jobs` at a time, and report each outcome."""
    waiting = list(reversed(wanted))
    with tempfile.TemporaryDirectory() as folder:
        trees = [TreeCopy(Path(folder) / str(i)) for i in range(min(jobs, len(waiting)))]
        allowed = limits(trees[0], sorted({m.module for m in wanted})) if trees else {}
        while waiting or any(tree.mutant for tree in trees):
            for tree in trees:
                if tree.mutant is None and waiting:
                    mutant = waiting.pop()
                    tree.start(mutant, allowed[mutant.module])
                elif tree.mutant is not None:
                    mutant = tree.mutant
                    code = tree.wait(0.2)
                    if code is not None:
                        done(mutant, code == KILLED)


# --- the record ------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def summary(found: Mapping[str, Mapping[str, Any]], modules: Mapping[str, Sequence[Mutant]]) -> dict[str, Any]:
    """The figures by file, from outcomes by key; mutants that were not run count for nothing."""
    files: dict[str, Any] = {}
    for module, all_of in modules.items():
        ran = [m for m in all_of if m.key in found]
        killed = sum(bool(found[m.key]["killed"]) for m in ran)
        survivors = [
            {"line": m.line, "kind": m.kind, "before": m.before, "after": m.after}
            for m in ran
            if not found[m.key]["killed"]
        ]
        files[f"{SOURCES}/{module}.py"] = {
            "mutants": len(all_of), "run": len(ran), "killed": killed,
            "share_killed": round(killed / max(1, len(ran)), 4), "survivors": survivors,
        }  # fmt: skip
    ran_all, killed_all = (sum(f[name] for f in files.values()) for name in ("run", "killed"))
    return {
        "mutants": sum(f["mutants"] for f in files.values()), "run": ran_all, "killed": killed_all,
        "share_killed": round(killed_all / max(1, ran_all), 4), "files": files, "outcomes": dict(found),
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run what is missing in the record, and write it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation", description=str(__doc__).split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--file", action="append", help="a module of finetuning/defences, by its name")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=0, help="only N of the mutants that are due")
    parser.add_argument("--again", action="store_true", help="run killed mutants again too")
    options = parser.parse_args(argv)
    names = sorted(path.stem for path in (ROOT / SOURCES).glob("*.py") if path.stem != "__init__")
    modules = {n: list(mutants(n, (ROOT / SOURCES / f"{n}.py").read_text(encoding="utf-8"))) for n in names}
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["outcomes"] if RESULTS.exists() else {}
    current = {m.key for all_of in modules.values() for m in all_of}
    found = {key: value for key, value in known.items() if key in current}
    due = [
        m
        for name in options.file or names
        for m in modules[name]
        if options.again or not found.get(m.key, {}).get("killed")
    ]
    random.Random(0).shuffle(due)  # a run that is cut short is then a fair sample
    due.sort(key=lambda m: m.key not in found)  # survivors first: the tests may have learnt something
    due = due[: options.limit or None]
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # what was loaded once is not searched again for garbage in each of the processes
    began, count = time.monotonic(), 0

    def done(mutant: Mutant, killed: bool) -> None:
        nonlocal count
        count += 1
        found[mutant.key] = {"killed": killed}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(summary(found, modules), indent=1) + "\n", encoding="utf-8")
        word = "killed  " if killed else "SURVIVED"
        where = f"{mutant.module}:{mutant.line} {mutant.kind}: {mutant.before} -> {mutant.after}"
        _say(f"{count}/{len(due)} {time.monotonic() - began:5.0f} s {word} {where}")

    run(due, options.jobs, done)
    for name, figures in summary(found, modules)["files"].items():
        _say(f"{name}: {figures['killed']} of {figures['run']} killed ({figures['mutants']} mutants)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
