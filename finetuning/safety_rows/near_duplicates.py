"""Which prompts are nearly the same: exact Jaccard of words and word pairs, found by an inverted index.

A held-out row that differs from a trained one by a word measures memory. Method: prefix filtering (Chaudhuri, Ganti
and Kaushik, 2006): two sets that are alike enough share one of their rarest members, so only those are indexed.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
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
    sets, places = _distinct(texts)
    for same in places:
        yield from combinations(same, 2)
    for one, two in _distinct_alike(sets, alike):
        yield from ((min(i, j), max(i, j)) for i in places[one] for j in places[two])


def _distinct(texts: Sequence[str]) -> tuple[list[frozenset[str]], list[list[int]]]:
    """Each set of members once, and the places of the texts that have it: many may begin with the same 80 words."""
    found: dict[frozenset[str], list[int]] = {}
    for i, text in enumerate(texts):
        found.setdefault(members(text), []).append(i)
    return list(found), list(found.values())


def _distinct_alike(sets: Sequence[frozenset[str]], alike: float) -> Iterator[tuple[int, int]]:
    frequency = Counter(member for found in sets for member in found)
    index: defaultdict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(sets)), key=lambda i: (len(sets[i]), i)):
        own = sets[i]
        rarest = sorted(own, key=lambda member: (frequency[member], member))
        prefix = rarest[: len(own) - ceil(alike * len(own)) + 1]
        for j in {j for member in prefix for j in index[member]}:
            other = sets[j]  # not longer than `own`: shorter ones were met first
            if len(other) >= alike * len(own) and _jaccard(own, other) >= alike:
                yield i, j
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

    sets, places = _distinct(texts)
    firsts = [(same[0], other) for same in places for other in same[1:]]
    for i, j in (*firsts, *((places[one][0], places[two][0]) for one, two in _distinct_alike(sets, alike))):
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    return [root(i) for i in range(len(texts))]


def _jaccard(one: frozenset[str], two: frozenset[str]) -> float:
    shared = len(one & two)
    return shared / (len(one) + len(two) - shared)
