"""The line of asks that wait for the engine: tenants take turns; a large ask neither blocks others nor starves."""

from collections.abc import Callable, Iterator

from worker.serving.engine.asks import Ask
from worker.serving.engine.choices import OpenAsk

# An ask for which there is no room yet is passed over by smaller ones this often; then the room is kept for it.
_MOST_PASSES = 16


class Line:
    """Waiting asks, those of one tenant in the order in which they came."""

    def __init__(self) -> None:
        """An empty line."""
        # in the order of turns: whoever was just served comes last
        self._by_tenant: dict[str, list[OpenAsk]] = {}

    def __iter__(self) -> Iterator[OpenAsk]:
        for waiting in self._by_tenant.values():
            yield from waiting

    def __bool__(self) -> bool:
        return bool(self._by_tenant)

    def add(self, waiting: OpenAsk) -> None:
        """Put it behind the others of its tenant."""
        self._by_tenant.setdefault(waiting.ask.tenant, []).append(waiting)

    def remove(self, waiting: OpenAsk) -> None:
        """Take it out; its tenant keeps its turn."""
        own = self._by_tenant[waiting.ask.tenant]
        own.remove(waiting)
        if not own:
            del self._by_tenant[waiting.ask.tenant]

    def take(self, fits: Callable[[Ask], bool]) -> OpenAsk | None:
        """Take out whose turn it is, of those for which there is room; None where there is room for nobody."""
        kept_for = next((waiting for waiting in self if waiting.passes >= _MOST_PASSES), None)
        candidates = list(self) if kept_for is None else [kept_for]
        chosen = next((waiting for waiting in candidates if fits(waiting.ask)), None)
        if chosen is None:
            return None
        for waiting in self:
            waiting.passes += waiting is not chosen and not fits(waiting.ask)
        self.remove(chosen)
        tenant = chosen.ask.tenant
        if tenant in self._by_tenant:
            self._by_tenant[tenant] = self._by_tenant.pop(tenant)
        return chosen

    def clear(self) -> None:
        """Leave nobody in it."""
        self._by_tenant.clear()
