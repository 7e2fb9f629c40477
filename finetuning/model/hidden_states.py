"""Hooks on layer and attention outputs: collect hidden states, or edit them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def first_tensor(output: Any) -> Tensor:
    """The hidden state (B, T, D) of a module's output, which is a tensor or a tuple that begins with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_tensor(output: Any, hidden: Tensor) -> Any:
    """The same output with another hidden state."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def edited_outputs(modules: Sequence[nn.Module], edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While open, the i-th module's hidden output is edit(i, output).

    The edit is applied anew when a checkpointed layer is recomputed, so it must be a pure function of its arguments.
    """

    def hook(index: int) -> Callable[..., Any]:
        def run(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return with_tensor(output, edit(index, first_tensor(output)))

        return run

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def caught_outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """While open, collects the module's hidden outputs, one per call."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept.append(first_tensor(output))

    handle = module.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def caught_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """While open, collects the hidden states that enter the module, one tensor per call."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        kept.append(inputs[0] if inputs else named["hidden_states"])

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()
