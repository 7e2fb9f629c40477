"""The verbs up, base, train, serve, worker, models, migrate and the operator's: their options, and what is behind each.

What only one verb needs (torch, the embedded broker, the web server) is imported by that verb, so that an image
without it still runs the others.
"""

import argparse
import sys
from collections.abc import Callable

from app.core.settings import Settings, load_settings, take_settings
from worker.processes import keep_to_ourselves


def main(argv: list[str]) -> int:
    """Run one verb; its exit status."""
    parser = argparse.ArgumentParser(prog="immunotune")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up")
    verbs.add_parser("serve")
    verbs.add_parser("migrate")
    verbs.add_parser("base").add_argument("name", help="smollm2, tiny, a hub id or a local folder")
    verbs.add_parser("retire").add_argument("name", help="the id of the base that is served")
    rekey = verbs.add_parser("rekey")
    rekey.add_argument("--project", default="default")
    rekey.add_argument("--none", action="store_true", help="only revoke; the project has no key afterwards")
    verbs.add_parser("adopt")
    verbs.add_parser("audit").add_argument("--accept", action="store_true", help="sweep on whatever is found")
    verbs.add_parser("worker").add_argument("--queues", default="checks,train.cpu")
    verbs.add_parser("models", add_help=False)  # its options are the model server's own
    verbs.add_parser("train", add_help=False)
    options, rest = parser.parse_known_args(argv)
    if rest and options.verb not in ("models", "train"):
        parser.error(f"unknown: {' '.join(rest)}")
    settings = _settings_for(options.verb)
    served_by: dict[str, Callable[[], int]] = {
        "up": lambda: _up(settings),
        "base": lambda: _base(settings, options.name),
        "serve": lambda: _serve(settings),
        "worker": lambda: _worker(settings, options.queues),
        "models": lambda: _models(settings, rest),
        "train": lambda: _train(settings, rest),
        "migrate": lambda: _migrate(settings),
        "retire": lambda: _by_hand(settings, options),
        "rekey": lambda: _by_hand(settings, options),
        "adopt": lambda: _by_hand(settings, options),
        "audit": lambda: _by_hand(settings, options),
    }
    return served_by[options.verb]()


_START_PROGRAMS = ("up", "serve", "worker", "base")  # which must inherit no secret unasked


def _settings_for(verb: str) -> Settings:
    """Read once. What runs with the service's secrets keeps them to itself: other programs of the user could read them.

    The model server reads its settings itself, and a researcher's training is no service.
    """
    if verb == "train":
        return load_settings()
    keep_to_ourselves()
    return take_settings() if verb in _START_PROGRAMS else load_settings()


def _up(settings: Settings) -> int:
    from embedded import programs
    from embedded.launcher import StartFailed, Stopped, running, serve_until_stopped
    from finetuning.safety_rows.operator_file import require_fit

    try:
        require_fit(settings.operator_rows)
        with running(programs.with_served_base(settings), _say) as service:
            if programs.is_base_aligned(service.settings):  # otherwise chat is refused until it is
                _say("loading the model server")
                service.wait_for_chat()
            print(f"OPENAI_BASE_URL={service.address}\nOPENAI_API_KEY={service.default_key}", flush=True)
            _say(f"logs: {settings.data / 'logs'}; Ctrl-C stops everything")
            serve_until_stopped(service)
    except Stopped:
        return 0
    except (StartFailed, OSError, ValueError) as error:
        _say(f"cannot run the service: {error}")
        return 1
    return 0


def _base(settings: Settings, name: str) -> int:
    from embedded.programs import base_folder
    from finetuning.bases.fetch import FetchFailed, fetch

    try:
        fetch(name, base_folder(settings.model_copy(update={"base": name})), say=_say)
    except (FetchFailed, OSError) as error:
        _say(f"no base: {error}")
        return 1
    return 0


def _serve(settings: Settings) -> int:
    from app.api.http.server import serve
    from app.main import build_app

    serve(build_app(settings), settings)
    return 0


def _worker(settings: Settings, queues: str) -> int:
    from worker.tasks import run_worker

    return run_worker(settings, queues.split(","))


def _migrate(settings: Settings) -> int:
    from app.core.errors import StartRefused
    from app.core.storage.database import migrate

    try:
        migrate(settings)
    except StartRefused as error:
        _say(str(error))
        return 1
    return 0


def _by_hand(settings: Settings, options: argparse.Namespace) -> int:
    from embedded import operators

    match options.verb:
        case "retire":
            return operators.retire(settings, options.name)
        case "rekey":
            return operators.rekey(settings, options.project, revoke_only=options.none)
        case "adopt":
            return operators.adopt(settings)
        case _:
            return operators.audit(settings, accept=options.accept)


def _models(settings: Settings, options: list[str]) -> int:
    from embedded import operators

    refusal = operators.why_not_here(settings) if "--base" not in options else None
    if refusal is not None:
        _say(refusal)
        return 1
    from worker.serving.server import main as serve_models

    return serve_models(options)


def _train(settings: Settings, options: list[str]) -> int:
    from embedded.train import main as train

    return train(options, settings)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
