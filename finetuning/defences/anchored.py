"""Anchored fine-tuning: the weighted user loss, operator rows mixed in, and KL to the aligned model's own refusals.

Source: methods.md 5 (safety mixing, arXiv:2309.07875) and lab.md 3; the KL on first answer tokens is close to
arXiv:2406.05946.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.contract.recipe import AnchorSettings
from finetuning.model.base import FrozenBase, logits
from finetuning.model.decoding import Decoder
from finetuning.model.losses import row_nll
from finetuning.model.prefix_cache import Ids, PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import StepRows, mixed_in, pick
from finetuning.training.strategies import Backward, MicroBatch, StepLoss


@dataclass(frozen=True)
class KlAnchors:
    """n prompts with the aligned model's own first k answer ids; log_probs (n, k, V) are the aligned model's."""

    ids: tuple[Ids, ...]
    starts: tuple[int, ...]
    tokens: int
    log_probs: Tensor

    @staticmethod
    def none() -> "KlAnchors":
        """No anchors: the KL term is left out."""
        return KlAnchors((), (), 0, torch.zeros(0))


@torch.no_grad()
def make_anchors(
    base: FrozenBase,
    cache: PrefixCache,
    decoder: Decoder,
    prompts: Sequence[Ids],
    *,
    tokens: int,
    refused_first: set[int],
) -> KlAnchors:
    """Anchors on the prompts that the model, as it is now, begins to refuse (its first id is in `refused_first`)."""
    answers = decoder.answers(prompts, new_tokens=tokens)
    chosen = [
        (tuple(prompt), tuple(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(answer) == tokens and answer[0] in refused_first
    ]
    ids = tuple(prompt + answer for prompt, answer in chosen)
    starts = tuple(len(prompt) for prompt, _ in chosen)
    cache.share(ids)
    cache.prepare(ids)
    parts = [
        answer_log_probs(base, cache, ids[i : i + 16], starts[i : i + 16], k=tokens) for i in range(0, len(ids), 16)
    ]
    empty = torch.zeros(0, tokens, base.model.config.vocab_size, device=base.device)
    return KlAnchors(ids, starts, tokens, torch.cat(parts) if parts else empty)


def answer_log_probs(
    base: FrozenBase, cache: PrefixCache, ids: Sequence[Ids], starts: Sequence[int], *, k: int
) -> Tensor:
    """Log-probabilities (n, k, V) at the positions that predict the first k answer ids."""
    hidden = cache.hidden(ids)
    where = torch.tensor([[start - 1 + j for j in range(k)] for start in starts], device=hidden.device)
    rows = torch.arange(len(ids), device=hidden.device)[:, None]
    return F.log_softmax(logits(base.model, hidden[rows, where]).float(), dim=-1)


class Anchored:
    """loss = (B * sum_i w_i nll_i + sum of mixed rows' nll) / (B + mixed) + kl_weight * KL."""

    def __init__(
        self,
        base: FrozenBase,
        cache: PrefixCache,
        settings: AnchorSettings,
        *,
        refusals: Sequence[EncodedRow],
        benign: Sequence[EncodedRow],
        anchors: KlAnchors,
        seed: int,
    ) -> None:
        self._base = base
        self._cache = cache
        self._settings = settings
        self._refusals = refusals
        self._benign = benign
        self._anchors = anchors
        self._seed = seed

    def gradients(self, micro: MicroBatch, weights: Tensor, backward: Backward) -> StepLoss:
        """Add the micro-batch's gradient; the first slice of a step also carries the mixed rows and the anchors."""
        mixed = self.mixed(micro.step, micro.rows_before, micro.step_rows)
        user_share = micro.step_rows / (micro.step_rows + len(mixed))
        extra = mixed if micro.start == 0 else []
        found = row_nll(self._base, self._cache, [*micro.rows, *extra])
        n = len(micro.rows)
        loss = user_share * (weights.to(found.nll) * found.nll[:n]).sum()
        if extra:
            loss = loss + (1 - user_share) * found.nll[n:].mean()
        if micro.start == 0 and self._settings.kl_weight and self._anchors.ids:
            loss = loss + self._settings.kl_weight * self.kl(micro.step)
        if loss.requires_grad:
            backward(loss)
        return StepLoss(float(loss.detach()), float(found.correct[:n].sum()), int(found.tokens[:n].sum()))

    def prepare(self, batches: StepRows, steps: int) -> None:
        """Compute the cached states of every row that `steps` steps will mix in, all at once, which is faster."""
        wanted = [(step, batches.before(step), len(batches.at(step))) for step in range(steps)]
        self._cache.prepare([row.ids for place in wanted for row in self.mixed(*place)])

    def mixed(self, step: int, before: int, count: int) -> list[EncodedRow]:
        """The operator rows of a step that has `count` user rows after `before` of them: a pure function of the three.

        Refusals and benign rows by mix_refusal_share.
        """
        joined = mixed_in(before, count, self._settings.mix_share)
        if not joined or not (self._refusals or self._benign):
            return []
        offset = mixed_in(0, before, self._settings.mix_share)
        refused = mixed_in(offset, joined, self._settings.mix_refusal_share)
        chosen = [self._refusals[i] for i in self._pick(len(self._refusals), refused, step, "mix-refusals")]
        return chosen + [self._benign[i] for i in self._pick(len(self._benign), joined - refused, step, "mix-benign")]

    def kl(self, step: int) -> Tensor:
        """Mean over anchors and positions of KL(aligned || model), in nats."""
        chosen = self._pick(len(self._anchors.ids), self._settings.kl_rows, step, "anchors")
        ids = [self._anchors.ids[i] for i in chosen]
        starts = [self._anchors.starts[i] for i in chosen]
        ours = answer_log_probs(self._base, self._cache, ids, starts, k=self._anchors.tokens)
        aligned = self._anchors.log_probs[chosen]
        return F.kl_div(ours, aligned, log_target=True, reduction="none").sum(-1).mean()

    def _pick(self, n: int, count: int, step: int, stream: str) -> list[int]:
        return pick(n, count, seed=self._seed, step=step, stream=stream)
