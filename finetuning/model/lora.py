"""LoRA adapters on a base: attach, switch, read, save, join by rank, merge, rotate.

At most two live on a base: the frozen ALIGNMENT adapter and the TASK adapter that a job trains. They are never merged
into the weights.
"""

import hashlib
import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetuning.contract.recipe import LoraSettings
from finetuning.model.base import FrozenBase, linear_names

ALIGNMENT = "alignment"
TASK = "task"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


class AdapterMismatch(ValueError):
    """An adapter does not fit the base, or two adapters do not fit each other."""


@dataclass(frozen=True)
class Factors:
    """One map's LoRA factors: A (r, in), B (out, r), and the scale of B @ A."""

    a: Tensor
    b: Tensor
    scale: float


# What would change the product B A x scale, or bring more than factors.
_NOT_PLAIN = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
)

Adapter = dict[str, Factors]  # module path in the base -> factors


def first_trained_layer(base: FrozenBase, lora: LoraSettings) -> int:
    """Index of the lowest layer that `lora` trains. Raises AdapterMismatch if it asks for more than there are."""
    total = len(base.layers)
    if lora.trained_layers > total:
        raise AdapterMismatch(f"lora.trained_layers is {lora.trained_layers}, but the base has {total} decoder layers")
    return total - lora.trained_layers if lora.trained_layers else 0


def attach(base: FrozenBase, name: str, lora: LoraSettings, *, seed: int) -> None:
    """Add a fresh adapter: A normal with variance 1/in, B zero, both fp32.

    Raises AdapterMismatch for unknown target modules or a rank above a map's size.
    """
    with warnings.catch_warnings():
        # Two adapters on one base are meant here; peft warns about the second.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(_config(base, lora), base.model, adapter_name=name)
    for path, (a, b) in lora_modules(base, name).items():
        if lora.rank > min(a.weight.shape[1], b.weight.shape[0]):
            raise AdapterMismatch(f"lora.rank {lora.rank} is above the size of {path}")
    reinitialise(base, name, seed=seed)
    base.model.eval()  # new modules are born in training mode; dropout must never reach a score or a measurement
    set_trainable(base, None)


@torch.no_grad()
def reinitialise(base: FrozenBase, name: str, *, seed: int) -> None:
    """Make an attached adapter fresh again: A normal with variance 1/in, B zero, a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    for a, b in lora_modules(base, name).values():
        fresh = torch.randn(a.weight.shape, generator=generator)
        a.weight.copy_(fresh / fresh.shape[1] ** 0.5)
        b.weight.zero_()


def _config(base: FrozenBase, lora: LoraSettings) -> LoraConfig:
    first = first_trained_layer(base, lora)
    names = map_names(base)
    unknown = set(lora.target_modules) - set(names)
    if unknown:
        raise AdapterMismatch(f"lora.target_modules {sorted(unknown)} are not in this base; it has {names}")
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # peft types it int, its arithmetic takes any number
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules or names),
        layers_to_transform=list(range(first, len(base.layers))),
        layers_pattern=_stack_name(base),
        bias="none",
        task_type="CAUSAL_LM",
    )


def map_names(base: FrozenBase) -> list[str]:
    """Names of the linear maps of a decoder layer, whether or not adapters are attached."""
    paths = [path for path in linear_names(base.layers[-1]) if ".lora_" not in path]
    return sorted({path.removesuffix(".base_layer").rsplit(".", 1)[-1] for path in paths})


def _stack_name(base: FrozenBase) -> str:
    path: str = next(name for name, module in base.model.named_modules() if module is base.layers)
    return path.rsplit(".", 1)[-1]


def _lora_layers(base: FrozenBase) -> dict[str, LoraLayer]:
    return {name: m for name, m in base.model.named_modules() if isinstance(m, LoraLayer)}


def lora_modules(base: FrozenBase, name: str) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """The A and B maps of an adapter by module path, in order."""
    return {
        path: (layer.lora_A[name], layer.lora_B[name])
        for path, layer in _lora_layers(base).items()
        if name in layer.lora_A
    }


def parameters(base: FrozenBase, name: str) -> list[nn.Parameter]:
    """The adapter's parameters in a fixed order: A then B, module by module."""
    return [cast(nn.Parameter, m.weight) for pair in lora_modules(base, name).values() for m in pair]


def dropouts(base: FrozenBase, name: str) -> list[nn.Module]:
    """The adapter's dropout modules, for the loop to switch on while it learns."""
    return [layer.lora_dropout[name] for layer in _lora_layers(base).values() if name in layer.lora_A]


def set_trainable(base: FrozenBase, name: str | None) -> None:
    """Let gradients flow into one adapter only (or none)."""
    base.model.requires_grad_(requires_grad=False)
    if name is not None:
        for parameter in parameters(base, name):
            parameter.requires_grad = True


def set_active(base: FrozenBase, names: Sequence[str]) -> None:
    """Choose which adapters take part in the forward pass; () is the public base. Gradient flags stay as they are."""
    for layer in _lora_layers(base).values():
        present = [name for name in names if name in layer.lora_A]
        # peft's own set_adapter also flips requires_grad, which would unfreeze the alignment adapter.
        layer._active_adapter = present
        layer._disable_adapters = not present


@contextmanager
def active(base: FrozenBase, names: Sequence[str]) -> Iterator[None]:
    """`set_active` for a while."""
    layers = [m for m in base.model.modules() if isinstance(m, BaseTunerLayer)]
    before = [(list(m.active_adapters), m.disable_adapters) for m in layers]
    set_active(base, names)
    try:
        yield
    finally:
        for layer, (was_active, was_disabled) in zip(layers, before, strict=True):
            layer._active_adapter = was_active
            layer._disable_adapters = was_disabled


def read(base: FrozenBase, name: str) -> Adapter:
    """A copy of an adapter's factors, on the CPU in fp32."""
    scales = {path: layer.scaling[name] for path, layer in _lora_layers(base).items() if name in layer.lora_A}
    return {
        path: Factors(a.weight.detach().cpu().clone(), b.weight.detach().cpu().clone(), float(scales[path]))
        for path, (a, b) in lora_modules(base, name).items()
    }


@torch.no_grad()
def write(base: FrozenBase, name: str, adapter: Mapping[str, Factors]) -> None:
    """Put factors into an attached adapter of the same shape. Raises AdapterMismatch."""
    modules = lora_modules(base, name)
    if modules.keys() != adapter.keys():
        raise AdapterMismatch("the adapter's modules are not those of this base; was it made for another one?")
    for path, (a, b) in modules.items():
        factors = adapter[path]
        if a.weight.shape != factors.a.shape or b.weight.shape != factors.b.shape:
            raise AdapterMismatch(f"the adapter's shape differs at {path}")
        a.weight.copy_(factors.a)
        b.weight.copy_(factors.b)


def concat(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> Adapter:
    """One adapter whose delta is the exact sum of two: ranks add up, scales are folded into A, the new scale is 1.

    A module that one of them lacks keeps the other's factors with zero rows for the missing rank.
    """
    joined: Adapter = {}
    rank_first, rank_second = _rank(first), _rank(second)
    for path in dict.fromkeys([*first, *second]):
        known = first.get(path) or second[path]
        blank_a, blank_b = known.a.new_zeros(0, known.a.shape[1]), known.b.new_zeros(known.b.shape[0], 0)
        parts = [(first.get(path), rank_first), (second.get(path), rank_second)]
        a_parts: list[Tensor] = [blank_a]
        b_parts: list[Tensor] = [blank_b]
        for factors, rank in parts:
            a_parts.append(factors.scale * factors.a if factors else known.a.new_zeros(rank, known.a.shape[1]))
            b_parts.append(factors.b if factors else known.b.new_zeros(known.b.shape[0], rank))
        joined[path] = Factors(torch.cat(a_parts), torch.cat(b_parts, dim=1), 1.0)
    return joined


def _rank(adapter: Mapping[str, Factors]) -> int:
    return max((factors.a.shape[0] for factors in adapter.values()), default=0)


def rotate(adapter: Mapping[str, Factors], *, secret: str) -> Adapter:
    """The same delta in mixed coordinates: A' = G A, B' = B G^T with G random orthogonal, drawn from all of `secret`.

    Hides which rank rows came from which adapter; it protects nothing (methods.md 3, F2r).
    """
    rng = random.Random(secret)  # torch's generator keeps 32 bits of its seed: few enough to try them all
    out: Adapter = {}
    for path, factors in adapter.items():
        rank = factors.a.shape[0]
        drawn = torch.tensor([rng.gauss() for _ in range(rank * rank)], dtype=torch.float64)
        g = torch.linalg.qr(drawn.reshape(rank, rank))[0]
        a, b = g @ factors.a.double(), factors.b.double() @ g.T
        out[path] = Factors(a.to(factors.a.dtype), b.to(factors.b.dtype), factors.scale)
    return out


def save(
    adapter: Mapping[str, Factors], folder: Path, *, base_id: str, marks: Mapping[str, float] | None = None
) -> str:
    """Write a stock peft adapter folder; returns the sha256 of the weights file. `base_id` is a name, never a path.

    `marks` above 0 stand in the file's header: a pruned adapter says how it was, so that nobody prunes it twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for path, factors in sorted(adapter.items()):
        tensors[f"base_model.model.{path}.lora_A.weight"] = factors.a.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = factors.b.contiguous()
    rank = _rank(adapter)
    scale = next(iter(adapter.values())).scale
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_id, "inference_mode": True,
        "r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, **_where(adapter),
    }  # fmt: skip
    told = {name: str(value) for name, value in (marks or {}).items() if value}
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt", **told})
    _sort_marks(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def _sort_marks(file: Path) -> None:
    """Put the header's marks in order: the library's is random, and equal adapters must be equal files."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    file.write_bytes(data[:8] + text + data[end:])


def _where(adapter: Mapping[str, Factors]) -> dict[str, Any]:
    """Which modules the adapter sits on, in the words of a peft config."""
    indices = sorted({int(part) for path in adapter for part in path.split(".") if part.isdigit()})
    names = sorted({path.rsplit(".", 1)[-1] for path in adapter})
    stack = {path.split(f".{i}.")[0].rsplit(".", 1)[-1] for path in adapter for i in indices if f".{i}." in path}
    return {"target_modules": names, "layers_to_transform": indices, "layers_pattern": sorted(stack)[0]}


def load(folder: Path) -> Adapter:
    """Read a peft LoRA folder. Raises OSError; AdapterMismatch for anything but plain factors of one rank and scale, as
    foreign keys, missing halves and other kinds of adapters."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    unknown = [name for name in _NOT_PLAIN if config.get(name)]
    if unknown or config.get("peft_type") != "LORA":
        why = ", ".join(unknown) or "another peft_type than LORA"
        raise AdapterMismatch(f"{folder.name} is no plain LoRA adapter: its {CONFIG_FILE} sets {why}")
    tensors = load_file(str(folder / WEIGHTS_FILE))
    scale = float(config["lora_alpha"]) / int(config["r"])
    adapter: Adapter = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors.get(name.replace(".lora_A.", ".lora_B."))
            if b is None:
                raise AdapterMismatch(f"{folder.name}: {name} has no lora_B beside it")
            adapter[path] = Factors(a, b, scale)
    if 2 * len(adapter) != len(tensors):
        raise AdapterMismatch(f"{folder.name}: the file holds tensors that are no LoRA factors")
    return adapter


def digest(adapter: Mapping[str, Factors]) -> str:
    """A hash of an adapter's bytes; equal factors give equal digests."""
    state = hashlib.sha256()
    for path, factors in sorted(adapter.items()):
        state.update(path.encode() + str(factors.scale).encode())
        for tensor in (factors.a, factors.b):
            state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def lora_of(adapter: Mapping[str, Factors], base: FrozenBase) -> LoraSettings:
    """The shape that an adapter needs to be attached to `base`."""
    indices = {int(part) for path in adapter for part in path.split(".") if part.isdigit()}
    rank = _rank(adapter)
    return LoraSettings(
        rank=rank,
        alpha=next(iter(adapter.values())).scale * rank,
        target_modules=tuple(sorted({path.rsplit(".", 1)[-1] for path in adapter})),
        trained_layers=len(base.layers) - min(indices),
    )
