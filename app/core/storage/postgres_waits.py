"""A server that stands still: the limits that Postgres itself keeps end no call then, so ours do."""

from functools import cache
from typing import Any

from sqlalchemy import Engine, event


def bound_waits(engine: Engine, seconds: float) -> None:
    """From now on, no connection of this Postgres engine waits longer than that for one answer.

    Such a call raises OperationalError, as a lost connection does, and its connection is closed.
    """

    def connect(_dialect: object, _record: object, cargs: list[Any], cparams: dict[str, Any]) -> object:
        connection = _bounded().connect(*cargs, **cparams)
        connection.answer_seconds = seconds
        return connection

    event.listen(engine, "do_connect", connect)


@cache
def _bounded() -> Any:  # a class that psycopg, which SQLite's users do not have, is needed for
    from psycopg import Connection, OperationalError

    class Bounded(Connection[Any]):
        answer_seconds: float | None = None

        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            limit = self.answer_seconds if timeout is None else timeout
            try:
                return super().wait(gen, interval, limit)
            except OperationalError as error:
                if type(error).__name__ == "_WaitTimeout":
                    self.pgconn.finish()  # whatever answer still comes, it is nobody's
                raise

    return Bounded
