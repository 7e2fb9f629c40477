"""Randomness as a pure function of (seed, step, rank), and the settings that make equal runs equal to the bit."""

import hashlib
import hmac
import os
import platform
import random
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch


def mix(seed: int, *parts: int | str) -> int:
    """A 63-bit seed from a seed and any parts; equal inputs give equal seeds on every machine."""
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def secret_draw(secret: str, *parts: int | str) -> str:
    """What a generator that hides something starts from, 64 hex digits: HMAC-SHA256 of the parts under the secret.

    Whoever knows every part (a purpose, the customer's own seed) and not the secret can foretell none of it.
    """
    text = ":".join(str(part) for part in parts)
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def seed_of(draw: str) -> int:
    """The first 63 bits of a secret draw, for generators that take a number."""
    return int(draw[:16], 16) >> 1


def reseed(seed: int, step: int, rank: int = 0) -> None:
    """Seed every generator that a step may draw from."""
    value = mix(seed, "step", step, rank)
    random.seed(value)
    torch.manual_seed(value)


def make_deterministic(threads: int = 0) -> None:
    """Fix algorithms and thread count for the process; equal settings then give equal bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():  # the fused attention kernels' backward is not deterministic
        torch.backends.cuda.enable_mem_efficient_sdp(enabled=False)
        torch.backends.cuda.enable_flash_sdp(enabled=False)
    if threads:
        torch.set_num_threads(threads)


def made_by() -> dict[str, str]:
    """What computes: our own code by its text, and the libraries in which a change may change a bit, by version."""
    libraries = ("numpy", "safetensors", "tokenizers")
    return {
        "code": code_digest(Path(__file__).parents[1]),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        **{name: version(name) for name in libraries},
    }


@lru_cache(maxsize=4)
def code_digest(package: Path) -> str:
    """The sha256 of the package's modules and tables: a version number stays the same while one works on the code."""
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".toml")):
        digest.update(f"{path.relative_to(package)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def processor_name() -> str:
    """The processor's own name where Linux tells it: two of one instruction set may round differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rng_state() -> list[torch.Tensor]:
    """The state of every torch generator in use, to be replayed with set_rng_state."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states


def set_rng_state(states: list[torch.Tensor]) -> None:
    """Put back what rng_state returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
