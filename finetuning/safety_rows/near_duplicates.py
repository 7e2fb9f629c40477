"""Which prompts are nearly the same: exact Jaccard of words and word pairs, found by an inverted index.

A held-out row that differs from a trained one by a word measures memory. No third-party code and no torch: the same
check runs where a service starts. Method: prefix filtering (Chaudhuri, Ganti and Kaushik, 2006): two sets that are
alike enough share one of their rarest members, so only those are indexed.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil

# From here two prompts are one: "steal a car" and "steal a bike" in the same words are, a shared opening is not.
ALIKE = 0.6
# What follows is the same in every prompt of a template, or in none.
_MOST_WORDS = 80
# Scripts without spaces: each sign is a word.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")


def members(text: str) -> frozenset[str]:
    """The words and word pairs of a text, case, accents' form and punctuation aside."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = _WORD.findall(plain)[:_MOST_WORDS] or [plain]
    return frozenset(words) | {f"{a} {b}" for a, b in pairwise(words)}


def pairs_alike(texts: Sequence[str], *, alike: float = ALIKE) -> Iterator[tuple[int, int]]:
    """Places (earlier, later) of every two texts whose Jaccard index is at least `alike`, each pair once."""
    sets = [members(text) for text in texts]
    frequency = Counter(member for found in sets for member in found)
    index: defaultdict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(sets)), key=lambda i: (len(sets[i]), i)):
        own = sets[i]
        rarest = sorted(own, key=lambda member: (frequency[member], member))
        prefix = rarest[: len(own) - ceil(alike * len(own)) + 1]
        for j in {j for member in prefix for j in index[member]}:
            other = sets[j]  # not longer than `own`: shorter ones were met first
            if len(other) >= alike * len(own) and _jaccard(own, other) >= alike:
                yield (j, i) if j < i else (i, j)
        for member in prefix:
            index[member].append(i)


def clusters(texts: Sequence[str], *, alike: float = ALIKE) -> list[int]:
    """The cluster of each text, named by its first place: texts that are alike are in one, and theirs too."""
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs_alike(texts, alike=alike):
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    return [root(i) for i in range(len(texts))]


def _jaccard(one: frozenset[str], two: frozenset[str]) -> float:
    shared = len(one & two)
    return shared / (len(one) + len(two) - shared)
