"""Which revision the tables are of, and whether that is the one that this release was written for."""

from pathlib import Path

from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from app.core.errors import StartRefused


class WrongSchema(StartRefused):
    """The tables are of another revision than this release's; the message says what to do."""


def migrations() -> Config:
    """Alembic's configuration over our revisions: inside the installed package (anybody may have a `migrations`), in a
    clone beside it.
    """
    package = Path(__file__).parents[2]
    installed = package / "migrations"
    config = Config()
    config.set_main_option("script_location", str(installed if installed.is_dir() else package.parent / "migrations"))
    return config


def steps_to(connection: Connection, revision: str) -> list[str]:
    """The revisions to upgrade to, one after the other, to reach this one; an empty database takes all at once.

    Raises WrongSchema like `require_known`.
    """
    require_known(connection)
    found = set(_found(connection))
    if not found:
        return [revision]
    behind: list[str] = []
    for script in ScriptDirectory.from_config(migrations()).iterate_revisions(revision, "base"):
        if script.revision in found:
            break
        behind.append(script.revision)
    return behind[::-1] or [revision]


def require_known(connection: Connection) -> None:
    """Raises WrongSchema where a newer release has migrated: nobody else can tell what its tables mean."""
    known = {revision.revision for revision in ScriptDirectory.from_config(migrations()).walk_revisions()}
    unknown = sorted(set(_found(connection)) - known)
    if unknown:
        raise WrongSchema(
            f"The tables of the database are of revision {', '.join(unknown)}, which this release does not know: a "
            "newer one has migrated it. Start that release here, too, or restore the backup from before its migration."
        )


def require_newest(connection: Connection) -> None:
    """Raises WrongSchema unless the tables are of this very release's revision."""
    require_known(connection)
    needed, found = ScriptDirectory.from_config(migrations()).get_heads(), _found(connection)
    if set(found) != set(needed):
        now = f"are of revision {', '.join(found)}" if found else "are not there yet"
        raise WrongSchema(
            f"The tables of the database {now}, and this release needs {', '.join(needed)}. Run `immunotune migrate` "
            "once with this release, then start it again."
        )


def _found(connection: Connection) -> tuple[str, ...]:
    return MigrationContext.configure(connection).get_current_heads()
