"""`immunotune rows sources | build | check | card`: from local copies of public sets to rows that a service loads."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from finetuning.rows_builder.build import Built, NothingToBuild, build, build_seeds
from finetuning.rows_builder.card import card, width_sentence
from finetuning.rows_builder.check import Checked, check
from finetuning.rows_builder.local_copies import LONGEST, BadSource, Prompt, own_prompts, parse_given, read_prompts
from finetuning.rows_builder.sources import SETS, allows_commercial_use
from finetuning.safety_rows.operator_file import REFUSAL, BadOperatorRows, RoleLine, read_lines

_LONGEST = 1000


def main(argv: list[str]) -> int:
    """Run one of the four; 0 where the rows are accepted, 1 where something lacks or cannot be read."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except (BadSource, NothingToBuild, BadOperatorRows) as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="immunotune rows", description="Safety rows from public sets.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    sources = verbs.add_parser("sources", help="the sets known by name, with licence and use")
    sources.set_defaults(run=_sources)
    making = verbs.add_parser("build", help="split local copies of sets into the roles of a rows file")
    how = "a file or folder, and after it ,kind=... ,licence=... ,language=... ,category=..."
    making.add_argument("--from", dest="given", action="append", required=True, metavar="[NAME=]PATH", help=how)
    making.add_argument("--out", type=Path, required=True, help="the rows file, JSONL")
    making.add_argument("--use", choices=("commercial", "research"), default="commercial", help="what licences allow")
    making.add_argument("--preset", choices=("seeds",), help="seeds: the papers' set-up, from BeaverTails")
    making.add_argument("--held-back", type=Path, help="also write harmful prompts that no role has, to attack with")
    making.add_argument("--held-back-rows", type=int, default=60)
    making.add_argument("--no-own-prompts", action="store_true", help="without those written for this project")
    making.add_argument("--longest", type=int, default=_LONGEST, help="characters of a prompt")
    making.add_argument("--seed", type=int, default=0)
    making.set_defaults(run=_build)
    checking = verbs.add_parser("check", help="what a rows file lacks, what that does, how wide its gate is")
    checking.add_argument("file", type=Path)
    checking.add_argument("--use", choices=("commercial", "research"), default="research")
    checking.add_argument("--json", action="store_true", help="all of it as JSON")
    checking.set_defaults(run=_check)
    carding = verbs.add_parser("card", help="what a rows file is made of, as Markdown")
    carding.add_argument("file", type=Path)
    carding.set_defaults(run=_card)
    return parser


def _sources(_options: argparse.Namespace) -> int:
    for known in SETS.values():
        use = "commercial and research" if allows_commercial_use(known.licence) else "research only"
        measures = "; only measures" if known.evaluation_only else ""
        _say(f"{known.name:<14} {known.licence:<16} {use}{measures}")
        _say(f"{'':<14} {known.gives}; {known.where}")
    _say("plain          yours            CSV, TSV, JSON, JSONL or Parquet: prompt, answer, kind (harmful, benign,")
    _say("                                looks-harmful), source, category, language, licence")
    _say("Licences are as the publishers state them; gated sets ask for an account. Nothing is downloaded here.")
    return 0


def _build(options: argparse.Namespace) -> int:
    _require_sense(options)
    prompts = [*_read(options.given, options.longest), *([] if options.no_own_prompts else own_prompts())]
    back = options.held_back_rows if options.held_back else 0
    if options.preset == "seeds":
        built = build_seeds(prompts, use=options.use, seed=options.seed)
    else:
        built = build(prompts, use=options.use, seed=options.seed, held_back=back)
    for why, n in built.left_out.most_common():
        _say(f"left out: {n}, {why}")
    found = check(list(enumerate(built.lines, start=1)), commercial=options.use == "commercial")
    _tell(found)
    if found.unfit:
        _say("a role that lacks rows gets some from more prompts, or from a second source or category of that kind")
        return _refuse(f"nothing is written: a service would refuse {options.out.name}")
    _write(options.out, [_as_json(line) for line in built.lines])
    _say(f"{options.out}: {_roles(built)}")
    if options.held_back:
        _write(options.held_back, [_as_attack(prompt) for prompt in built.held_back])
        _say(f"{options.held_back}: {len(built.held_back)} prompts that no role has, of about {back} asked for")
    if found.lacking:
        _say(f"written, and a service would load it; {len(found.lacking)} things are lacking, as said above")
    return 0 if found.accepted else 1


def _require_sense(options: argparse.Namespace) -> None:
    """What no set needs to be read for. Raises BadSource."""
    if options.preset and options.held_back:
        raise BadSource("--preset seeds holds nothing back; leave out --held-back")
    if not 1 <= options.longest <= LONGEST:
        raise BadSource(f"--longest is from 1 to {LONGEST}")
    for path in (options.out, options.held_back):
        if path is not None and not path.absolute().parent.is_dir():
            raise BadSource(f"the folder of {path} is not there; make it first")


def _read(given: Sequence[str], longest: int) -> list[Prompt]:
    """The prompts of every file, with a line on each. Raises BadSource."""
    prompts: list[Prompt] = []
    for text in given:
        found = parse_given(text)
        read = list(read_prompts(found))
        mine = [p for p in read if len(p.text) <= longest]
        long = len(read) - len(mine)
        also = f"; {long} longer than {longest} characters are left out" if long else ""
        _say(f"{found.path.name}: read as {_sets(read)}: {len(mine)} prompts ({_licences(mine)}){also}")
        prompts += mine
    return prompts


def _check(options: argparse.Namespace) -> int:
    found = check(list(read_lines(options.file)), commercial=options.use == "commercial")
    if options.json:
        _say(json.dumps({"accepted": found.accepted, **asdict(found)}, indent=2, ensure_ascii=False))
    else:
        _tell(found)
    return 0 if found.accepted else 1


def _card(options: argparse.Namespace) -> int:
    sys.stdout.write(card(options.file))
    return 0


def _tell(found: Checked) -> None:
    for width in found.widths:
        _say(f"gate: {width_sentence(width)}")
    for fault in found.unfit:
        _say(f"cannot serve: {fault.sentence}")
    for fault in found.lacking:
        _say(f"lacks: {fault.sentence}")
    _say("accepted" if found.accepted else f"not accepted: {len(found.unfit)} cannot serve, {len(found.lacking)} lack")


def _sets(prompts: Sequence[Prompt]) -> str:
    names = list(dict.fromkeys(p.source for p in prompts))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more sources" if len(names) > 3 else "") or "nothing"


def _licences(prompts: Sequence[Prompt]) -> str:
    return ", ".join(f"{n} {licence}" for licence, n in Counter(p.licence for p in prompts).most_common()) or "none"


def _roles(built: Built) -> str:
    count = Counter(line.role for line in built.lines if line.role != REFUSAL)
    return ", ".join(f"{role} {n}" for role, n in count.items())


def _as_json(line: RoleLine) -> str:
    said = line.model_dump(exclude_defaults=True)
    return json.dumps({"role": line.role, "prompt": line.prompt, **said}, ensure_ascii=False)


def _as_attack(prompt: Prompt) -> str:
    return json.dumps({"prompt": prompt.text, "category": prompt.category, "source": prompt.source}, ensure_ascii=False)


def _write(path: Path, lines: Sequence[str]) -> None:
    """All lines or none: a file that is cut short would lack roles."""
    part = path.with_name(f".{path.name}.part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path(part).replace(path)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _refuse(why: str) -> int:
    sys.stderr.write(why + "\n")
    return 1
