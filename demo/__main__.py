"""`./run demo` and `./run align`: start the embedded service, go through the steps of steps.py, end it again."""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from openai import APIError, OpenAI

from app.core.settings import load_settings
from demo import report, steps
from demo.customer_file import CustomerFile, write_customer_file
from demo.progress_line import say
from demo.steps import DemoFailed, DemoFindings, FinishedJob
from embedded.launcher import RunningService, StartFailed, Stopped, running
from embedded.programs import base_folder
from finetuning.recipes.library import base_of
from finetuning.safety_rows.invented import dev_rows
from finetuning.safety_rows.operator_file import require_fit

MOST_ROWS = 300
SDK_RETRIES = 5


def main(argv: list[str]) -> int:
    """0 when the job succeeded and the downloaded adapter answered the same; 1 also for a job without a model."""
    options, begin = _options(argv), time.monotonic()
    settings = load_settings()
    # Two demos, or a demo beside a service, never meet on a port; the data folder has its own lock.
    settings = settings.model_copy(update={"base": options.base or settings.base, "port": 0})
    try:
        require_fit(settings.operator_rows)
        with running(settings, lambda line: say(f"  {line}"), for_demo=True) as service:
            if options.align_only:
                return _align(service)
            result = _demo(service, options, begin)
    except Stopped:
        return 130
    except (StartFailed, DemoFailed, ValueError, OSError) as error:
        return _stopped(str(error), aligns=options.align_only)
    except APIError as error:
        return _stopped(
            f"the service refused a request or was not there ({error.message}); see {settings.data / 'logs'}"
        )
    # after the last program has stopped, so that the table is the last thing on the screen
    say("")
    report.show(result.rows, result.title)
    if result.no_model:
        say(f"Immunotune's job ended without a model: {result.no_model}\nIts report: {result.report_file}")
    return 0 if result.same_answers else 1


def _stopped(why: str, *, aligns: bool = False) -> int:
    print(f"{'nothing is aligned' if aligns else 'the demo stopped'}: {why}", file=sys.stderr)
    return 1


def _options(argv: list[str]) -> argparse.Namespace:
    aligns = "--align-only" in argv
    parser = argparse.ArgumentParser(prog="immunotune align" if aligns else "immunotune demo")
    parser.add_argument("--base", help="smollm2 (default), tiny, a hub id or a local folder")
    parser.add_argument("--align-only", action="store_true", help=argparse.SUPPRESS)
    if aligns:
        return parser.parse_args(argv)
    parser.add_argument("--train", type=Path, help="chat JSONL to train on (default: the support tickets we ship)")
    parser.add_argument("--test", type=Path, help="chat JSONL to score on (default: the last tenth of --train)")
    parser.add_argument("--harmful-share", type=float, default=0.1, help="planted share of harmful rows (0.1)")
    parser.add_argument("--rows", type=int, default=MOST_ROWS, help=f"use the first rows only ({MOST_ROWS})")
    return parser.parse_args(argv)


@contextmanager
def chosen_rows(train: Path | None, test: Path | None) -> Iterator[tuple[Path, Path | None]]:
    """The files to train and to score on: the user's own, or the tickets that lie in this package."""
    if train is not None:
        yield train, test
        return
    shipped = files("demo") / "rows"
    with as_file(shipped / "tickets_train.jsonl") as tickets, as_file(shipped / "tickets_test.jsonl") as test_tickets:
        yield tickets, test or test_tickets


def _client(service: RunningService, key: str) -> OpenAI:
    return OpenAI(base_url=service.address, api_key=key, max_retries=SDK_RETRIES)


def _align(service: RunningService) -> int:
    client = _client(service, service.default_key)
    base = steps.wait_for_base(client, base_of(service.settings.base).id, DemoFindings(), service.watch)
    say(f"{base} is aligned and kept in {service.settings.data}")
    return 0


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows at its end."""

    title: str
    rows: list[report.Figures]
    report_file: Path
    same_answers: bool
    no_model: str | None


def _demo(service: RunningService, options: argparse.Namespace, begin: float) -> DemoResult:
    findings = DemoFindings()
    folder = service.settings.data / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    with chosen_rows(options.train, options.test) as (train, test):
        customer = write_customer_file(train, test, options.harmful_share, folder / "files", most=options.rows)
    client, baseline = _client(service, service.default_key), _client(service, service.baseline_key)
    say(f"the service answers at {service.address}")
    base = steps.wait_for_base(client, base_of(service.settings.base).id, findings, service.watch)
    say(f"customer file: {customer.rows} rows, {len(customer.planted_lines)} of them harmful (planted)")
    immune = steps.finish_job(
        client, steps.start_job(client, base, customer),
        title="Immunotune", expected=steps.JOB_SECONDS, idle=service.watch,
    )  # fmt: skip
    plain_id = steps.start_job(baseline, base, customer)  # it trains while the first job's model is put to use
    _count_verdicts(client, customer, immune, findings)
    no_model = None if immune.job.fine_tuned_model else steps.why_no_model(immune.job)
    if no_model is None:
        service.wait_for_chat()
    base_files = base_folder(service.settings)
    same = no_model is None and _use_model(client, immune, customer, findings, base=base_files, folder=folder)
    plain = steps.finish_job(
        baseline, plain_id, title="plain fine-tuning", expected=steps.PLAIN_SECONDS, idle=service.watch
    )
    findings.facts |= {"base": base, "rows": customer.rows, "planted": len(customer.planted_lines)}
    findings.facts |= {"job": immune.job.status if no_model is None else no_model}
    findings.facts |= {"plain_job": plain.job.error.code if plain.job.error else plain.job.status}
    findings.seconds["total"] = time.monotonic() - begin
    rows = steps.as_figures(immune, plain, findings.facts["align_seconds"])
    report_file = report.write(folder / "report.json", rows, findings.facts | {"seconds": findings.seconds})
    planted = f"{customer.rows} rows, {len(customer.planted_lines)} of them planted"
    total = f"{findings.seconds['total']:.0f} s in all"
    title = f"{base}, {planted}; held-out prompts, greedy answers; {total}"
    return DemoResult(title, rows, report_file, same, no_model)


def _count_verdicts(client: OpenAI, customer: CustomerFile, immune: FinishedJob, findings: DemoFindings) -> None:
    findings.facts["verdicts"] = counts = steps.count_verdicts(client, immune.job.id, customer.planted_lines)
    steps.print_verdicts(counts)
    steps.print_methods(immune.job)
    findings.facts |= {"pruning": immune.report.get("pruning"), "mu": immune.report.get("mu")}


def _use_model(
    client: OpenAI, immune: FinishedJob, customer: CustomerFile, findings: DemoFindings, *, base: Path, folder: Path
) -> bool:
    """Chat, download, the same answers elsewhere: whether all are equal."""
    model = immune.job.fine_tuned_model or ""
    harmful, benign = dev_rows(8)
    prompts = [*customer.short_prompts(1), benign[-1].prompt, harmful[0].prompt]
    findings.facts["chat"] = list(zip(prompts, steps.chat(client, model, prompts), strict=True))
    for prompt, answer in findings.facts["chat"]:
        say(f"  > {prompt[:100]}\n    {answer[:100]}")
    compared = [*customer.short_prompts(steps.COMPARED_PROMPTS - 2), *prompts[1:]]
    served = steps.chat(client, model, compared)
    adapter = steps.download_adapter(client, immune.job.id, folder)
    elsewhere = steps.answer_with_plain_peft(base, adapter, compared)
    equal = sum(a.strip() == b.strip() for a, b in zip(served, elsewhere, strict=True))
    findings.facts["same_answers"] = {"equal": equal, "of": len(compared)}
    say(f"  downloaded adapter in plain transformers + peft: {equal} of {len(compared)} answers equal the served ones")
    return equal == len(compared)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
