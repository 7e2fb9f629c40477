"""How long each stage took, on the monotonic clock."""

from time import monotonic


class StageClock:
    """Splits a run into named spans: starting one ends the one before."""

    def __init__(self) -> None:
        self._spans: dict[str, float] = {}
        self._name = "load"
        self._since = monotonic()

    def start(self, name: str) -> None:
        """End the running span and begin `name`; a name that returns adds up."""
        now = monotonic()
        self._spans[self._name] = self._spans.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now

    def seconds(self) -> dict[str, float]:
        """All spans so far, the running one included, rounded to 10 ms."""
        self.start(self._name)
        return {name: round(value, 2) for name, value in self._spans.items()}
