"""How one token is drawn from one row's logits: temperature, nucleus, penalties, biases and the reported logprobs.

Everything is about one row at a time, so that a row's draw never depends on its neighbours: every tensor is one row's,
(V,) over the vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The choices of one request. `top_logprobs` None reports none; 0..20 reports the drawn token and that many."""

    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural logprob under the model's own distribution, before penalties and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class BadLogits(ValueError):
    """The model gave a row logits from which nothing can be drawn, as an adapter with broken weights does."""


@dataclass(frozen=True)
class Drawn:
    """The token drawn, and its logprobs when they were asked for."""

    token: int
    logprob: TokenLogprob | None


def draw(logits: Tensor, sampling: Sampling, counts: Mapping[int, int], generator: torch.Generator) -> Drawn:
    """Draw the next token from (V,) fp32 logits; `counts` says how often the completion already holds each token.

    Temperature 0 takes the largest adjusted logit (the lowest id on a tie) and leaves the generator untouched. Raises
    BadLogits.
    """
    # a token at minus infinity is one that the model rules out; the largest is finite unless there is nothing to draw
    if not bool(torch.isfinite(logits.max())):
        raise BadLogits("the largest logit is not finite")
    adjusted = _adjust(logits, sampling, counts)
    token = int(adjusted.argmax()) if sampling.temperature == 0 else _sample(adjusted, sampling, generator)
    return Drawn(token, _report(logits, token, sampling.top_logprobs))


def _adjust(logits: Tensor, sampling: Sampling, counts: Mapping[int, int]) -> Tensor:
    penalised = bool(counts) and (sampling.presence_penalty != 0 or sampling.frequency_penalty != 0)
    if not penalised and not sampling.logit_bias:
        return logits
    adjusted = logits.clone()
    if penalised:
        tokens = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=adjusted.dtype, device=logits.device)
        adjusted[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
        adjusted[tokens] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    return adjusted


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    # the generator lives on the CPU, so that a seed means the same draw on every device
    doubles = logits.double().cpu()
    # the largest is 0 before the division, so that no temperature above 0, however small, gives infinity less infinity
    probabilities = torch.softmax((doubles - doubles.max()) / sampling.temperature, dim=-1)
    if sampling.top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    kept = ordered.cumsum(0) - ordered < sampling.top_p  # the smallest set that reaches top_p, never empty
    return int(tokens[torch.multinomial(ordered * kept, 1, generator=generator)])


def _report(logits: Tensor, token: int, top: int | None) -> TokenLogprob | None:
    if top is None:
        return None
    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = logprobs.topk(min(top, logprobs.numel()))
    best = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), best)
