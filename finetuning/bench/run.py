"""`./run bench NAME`: timings as ratios against a named peer in the same run; shown, and kept as JSON.

Knows how to time and report; what is timed stands in speed.py, the bench of defences in safety.py. Must not be
imported by the product.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from finetuning.bench import safety, speed

BENCHES: dict[str, Callable[[Path], list[speed.Contest]]] = {
    "prefix": speed.prefix_reuse,
    "packed": speed.packed_maps,
    "steps": speed.alignment_steps,
    "decoding": speed.decoding,
}
_ROUNDS = 5


def main(arguments: list[str], data: Path) -> int:
    """Run one bench; 0 when its figures were written. `data` keeps bases and results."""
    if arguments[:1] == ["safety"]:
        return safety.main(arguments[1:], data)
    parser = argparse.ArgumentParser(prog="immunotune bench")
    parser.add_argument("name", choices=sorted([*BENCHES, "safety"]))
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    chosen = parser.parse_args(arguments)
    results: list[dict[str, object]] = []
    for contest in BENCHES[chosen.name](data):
        result = _measure(contest, chosen.rounds)
        results.append(result)
        sys.stdout.write(
            f"{contest.name}: {result['seconds']:.3f} s, {contest.peer}: {result['peer_seconds']:.3f} s,"
            f" ratio {result['ratio']:.2f} ({result['ratio_low']:.2f} to {result['ratio_high']:.2f})\n"
        )
    target = data / "bench" / f"{chosen.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"hardware": _hardware(), "results": results}, indent=2), encoding="utf-8")
    sys.stdout.write(f"written to {target}\n")
    return 0


def _measure(contest: speed.Contest, rounds: int) -> dict[str, object]:
    """Both sides in turn, so that a machine that slows down slows both; medians and the spread of the ratio."""
    ours: list[float] = []
    peers: list[float] = []
    for i in range(rounds + 1):
        sys.stdout.write(f"  {contest.name}: round {i} of {rounds}\r")
        sys.stdout.flush()
        pair = [_seconds(contest.run), _seconds(contest.run_peer)]
        if i:  # the first round warms up
            ours.append(pair[0])
            peers.append(pair[1])
    ratios = sorted(a / b for a, b in zip(ours, peers, strict=True))
    return {
        "name": contest.name, "peer": contest.peer, "rounds": rounds, "seconds": median(ours),
        "peer_seconds": median(peers), "ratio": median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1],
    }  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _hardware() -> dict[str, object]:
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    return {**machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
