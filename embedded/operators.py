"""What an operator tells a deployment by hand: another base, another key, a restored database or store.

Each asks only database and store, prints what it did, and returns an exit status.
"""

import sys
from collections.abc import Callable

from app.core import deployment, models, projects
from app.core.errors import NotFound, StartRefused, StoreDown
from app.core.settings import Settings
from app.core.storage.blobs import open_blobs
from app.core.storage.database import DATABASE_DOWN, Database, open_database
from app.core.storage.schema import require_newest


def retire(settings: Settings, base_id: str) -> int:
    """Stop serving a base."""

    def work(database: Database) -> str:
        with database.writing() as session:
            try:
                waiting = models.retire_base(session, base_id)
            except NotFound as error:
                raise StartRefused(f"There is no base '{base_id}'; GET /v1/models lists them.") from error
            session.commit()
        return (
            f"{base_id} is retired; {waiting} jobs wait for it. Start every process with the new IMMUNOTUNE_BASE; "
            f"started with {base_id} again they serve it as before."
        )

    return _done(settings, work)


def rekey(settings: Settings, project: str, *, revoke_only: bool) -> int:
    """Change the key of a project, or leave it without one. Prints a key that was made, on standard output alone."""

    def work(database: Database) -> str:
        pepper = projects.load_pepper(settings)
        with database.writing() as session:
            if revoke_only:
                count = projects.revoke_keys(session, projects.get_project(session, project))
                session.commit()
                return f"{count} keys of {project} are revoked."
            secret = projects.new_key(session, settings, pepper, name=project)
            session.commit()
        if project == "default" and settings.api_key is None:
            projects.keep_key(settings, secret)
        print(secret, flush=True)
        return f"That is the key of {project} now; its others are revoked."

    return _done(settings, work)


def adopt(settings: Settings) -> int:
    """Bind database and store to each other, whatever they belonged to."""

    def work(database: Database) -> str:
        own = deployment.adopt(database, open_blobs(settings))
        return (
            f"Database and blob store are {own} now. Nothing is swept before an audit: run `immunotune audit`. "
            "Processes that use one of the two with another database or store refuse from their next start on."
        )

    return _done(settings, work)


def audit(settings: Settings, *, accept: bool) -> int:
    """Hold rows against bytes; 1 where the sweep stays off."""
    passed = False

    def work(database: Database) -> str:
        nonlocal passed
        share = settings.limits.sweep_share
        found = deployment.check(database, open_blobs(settings), most_share=share, accept=accept)
        passed = accept or found.passes(share)
        so = "The sweep goes on." if passed else (
            "The sweep stays off. Put back what is missing, or say that you mean it: `immunotune audit --accept`."
        )  # fmt: skip
        return (
            f"{found.needed} blobs are needed, {found.missing} of them are missing; of the {found.total} in the store "
            f"{found.unknown} are nobody's. {so}"
        )

    return _done(settings, work) or int(not passed)


def why_not_here(settings: Settings) -> str | None:
    """Why a model server of these settings must not start; None also where it cannot ask, for it needs no database."""
    try:
        deployment.require_ours(settings)
    except StartRefused as error:
        return str(error)
    except (StoreDown, *DATABASE_DOWN) as error:
        _say(f"database or store do not answer ({type(error).__name__}), so it is not known whether the base is right")
    return None


def _done(settings: Settings, work: Callable[[Database], str]) -> int:
    database = open_database(settings)
    try:
        with database.reading() as session:
            require_newest(session.connection())
        _say(work(database))
    except (StartRefused, StoreDown) as error:
        _say(str(error))
        return 1
    except DATABASE_DOWN as error:
        _say(f"the database does not answer: {type(error).__name__}")
        return 1
    finally:
        database.close()
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
