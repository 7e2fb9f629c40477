"""One job's model with everything around it: base, adapters, caches, operator rows, judge.

Knows how they fit together; must not know stages or decisions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from finetuning.contract.order import TrainOrder
from finetuning.contract.recipe import Anchor, Optimiser, Recipe
from finetuning.defences.anchored import Anchored, KlAnchors, make_anchors
from finetuning.job.measure import Bench
from finetuning.job.readings import first_ids
from finetuning.judging.guards import open_judge
from finetuning.judging.judges import JUDGES
from finetuning.model import lora
from finetuning.model.base import BaseModel, load_base
from finetuning.model.decoding import Decoder
from finetuning.model.digest import files_digest
from finetuning.model.packed_linear import can_pack
from finetuning.model.prefix_cache import PrefixCache
from finetuning.model.state_store import FORM, KeptStates
from finetuning.rows.chat_format import EncodedRow, encode_pair, prompt_ids
from finetuning.safety_rows.invented import Pair, SafetyRows, safety_rows
from finetuning.safety_rows.operator_file import load_safety_rows
from finetuning.training.batches import Batches
from finetuning.training.checkpoint import fingerprint
from finetuning.training.determinism import mix, processor_name
from finetuning.training.state import TrainSetup
from finetuning.training.strategies import GradientStep, RowWeigher

_ANCHOR_PROMPTS = 48


@dataclass
class Workbench:
    """The job's moving parts. `trained` is the adapter name that this job trains."""

    recipe: Recipe
    base: BaseModel
    cache: PrefixCache
    decoder: Decoder
    bench: Bench
    rows: SafetyRows
    refusal_ids: list[int]
    trained: str
    anchors: dict[int, KlAnchors] = field(default_factory=dict)  # by kl_tokens: scout and training share them

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedRow]:
        """Operator pairs as training rows; their states may be kept for later jobs, so no customer's text goes here."""
        most = self.recipe.max_tokens
        rows = [encode_pair(self.base.tokenizer, p.prompt, p.answer, max_tokens=most) for p in pairs]
        self.cache.share([row.ids for row in rows])
        return rows

    @contextmanager
    def aligned(self) -> Iterator[None]:
        """The aligned base: the task adapter is off."""
        with lora.active(self.base, (lora.ALIGNMENT,)):
            yield

    @contextmanager
    def public(self) -> Iterator[None]:
        """The public base: no adapter at all."""
        with lora.active(self.base, ()):
            yield


def open_workbench(order: TrainOrder, scratch: Path) -> Workbench:
    """Load the base and attach the job's adapters. Raises UnknownLayers, AdapterMismatch, BadOperatorRows, BadGuard,
    OSError."""
    recipe = order.recipe
    base = load_base(order.base, device=order.device)
    rows = load_safety_rows(scratch / order.operator_rows) if order.operator_rows else safety_rows()
    if order.alignment is None:
        trained = lora.ALIGNMENT
        cut = lora.first_trained_layer(base, recipe.lora)
        lora.attach(base, trained, recipe.lora, seed=mix(recipe.seed, "init"))
        lora.set_active(base, (trained,))
    else:
        trained = lora.TASK
        cut = _attach_both(base, recipe, lora.load(scratch / order.alignment))
    lora.set_trainable(base, trained)
    cache = PrefixCache(base, cut, folder=scratch / order.cache if order.cache else None, kept=_kept_states(order, cut))
    decoder = Decoder(base, cache)
    guard = open_judge(order.judge, device=order.device) if order.judge else None
    bench = Bench(base, cache, decoder, JUDGES[rows.judge], recipe.evaluation.new_tokens, guard)
    return Workbench(recipe, base, cache, decoder, bench, rows, first_ids(base.tokenizer, rows.refusals), trained)


def _attach_both(base: BaseModel, recipe: Recipe, alignment: lora.Adapter) -> int:
    """The frozen alignment and the adapter to train; returns the lowest layer that one of them changes."""
    aligned_lora = lora.lora_of(alignment, base)
    single = recipe.task_adapter == "single"
    lora.attach(base, lora.ALIGNMENT, aligned_lora, seed=0)
    lora.write(base, lora.ALIGNMENT, alignment)
    lora.attach(base, lora.TASK, aligned_lora if single else recipe.lora, seed=mix(recipe.seed, "init"))
    if single:
        lora.write(base, lora.TASK, alignment)
    lora.set_active(base, (lora.TASK,) if single else (lora.ALIGNMENT, lora.TASK))
    return min(lora.first_trained_layer(base, shape) for shape in (recipe.lora, aligned_lora))


def _kept_states(order: TrainOrder, cut: int) -> KeptStates | None:
    """The folder of states that fit this base, cut, machine and libraries to the bit; None without a known base."""
    files = files_digest(Path(order.base), order.base_sha256)
    if not order.states or not files:
        return None
    made_of = {
        "base": files, "cut": str(cut), "form": FORM, "device": order.device, "processor": processor_name(),
        "transformers": transformers.__version__, "packed": str(can_pack()),
    }  # fmt: skip
    mark = fingerprint(made_of, threads=torch.get_num_threads())
    return KeptStates(Path(order.states) / mark[:16])


def reset_task(bench: Workbench) -> None:
    """Back to the untrained task adapter: random A, zero B, the same ones every time; `single`: the alignment's."""
    if bench.recipe.task_adapter == "single":
        lora.write(bench.base, bench.trained, lora.read(bench.base, lora.ALIGNMENT))
        return
    lora.reinitialise(bench.base, bench.trained, seed=mix(bench.recipe.seed, "init"))


def refusal_ids(bench: Workbench) -> list[tuple[int, ...]]:
    """The stock refusals as answer ids, end token included."""
    rows = bench.encode([Pair("?", refusal) for refusal in bench.rows.refusals])
    return [row.ids[row.prompt_tokens :] for row in rows]


def anchors_of(bench: Workbench, settings: Anchor) -> KlAnchors:
    """The aligned model's own first tokens on operator prompts that it refuses, with its log-probabilities.

    None are made when the KL weighs nothing.
    """
    if not settings.kl_weight:
        return KlAnchors.none()
    if settings.kl_tokens not in bench.anchors:
        prompts = [tuple(prompt_ids(bench.base.tokenizer, p.prompt)) for p in bench.rows.aligned[:_ANCHOR_PROMPTS]]
        with bench.aligned():
            bench.anchors[settings.kl_tokens] = make_anchors(
                bench.base, bench.cache, bench.decoder, prompts,
                tokens=settings.kl_tokens, refused_first=set(bench.refusal_ids),
            )  # fmt: skip
    return bench.anchors[settings.kl_tokens]


def anchored_step(
    bench: Workbench,
    settings: Anchor,
    anchors: KlAnchors,
    *,
    seed: int,
    refused: Sequence[EncodedRow] = (),
    answered: Sequence[EncodedRow] = (),
) -> Anchored:
    """The finetune step: weighted user loss, mixed operator rows, KL anchors. All strengths 0 equal Plain.

    `refused` and `answered` join the operator's rows that are mixed in.
    """
    return Anchored(
        bench.base, bench.cache, settings, refusals=[*bench.encode(bench.rows.aligned), *refused],
        benign=[*bench.encode(bench.rows.benign), *answered], anchors=anchors, seed=seed,
    )  # fmt: skip


def training(  # noqa: PLR0913  one argument per slot of the loop
    bench: Workbench,
    rows: Sequence[EncodedRow],
    step: GradientStep,
    weigher: RowWeigher,
    *,
    steps: int,
    seed: int,
    optimiser: Optimiser | None = None,
    folder: Path | None = None,
    fingerprint: str = "",
    lines: Sequence[int] = (),
) -> TrainSetup:
    """A ready TrainSetup over the trained adapter."""
    return TrainSetup(
        rows=rows, batches=Batches(len(rows), bench.recipe.batch_size, seed), step=step, weigher=weigher,
        parameters=lora.parameters(bench.base, bench.trained), steps=steps,
        optimiser=optimiser or bench.recipe.optimiser,
        micro_batch_size=bench.recipe.micro_batch_size, seed=seed, save_every=bench.recipe.save_every if folder else 0,
        folder=folder, fingerprint=fingerprint, dropouts=lora.dropouts(bench.base, bench.trained), lines=lines,
    )  # fmt: skip
