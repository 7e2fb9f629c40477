"""One job, opened: its recipe, the adapted base, the operator's rows, and who reads and measures the model.

Stages get the whole; a room that needs one part takes that part. Must not know stages or decisions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from finetuning.contract.order import TrainOrder
from finetuning.contract.recipe import AnchorSettings, OptimiserSettings, Recipe
from finetuning.defences.anchored import Anchored, KlAnchors, make_anchors
from finetuning.job.measure import Measuring
from finetuning.job.readings import RefusalReader, refusal_starts
from finetuning.judging.guards import open_judge
from finetuning.judging.judges import RULES
from finetuning.judging.refusals import refusal_reader
from finetuning.model import lora
from finetuning.model.adapted import AdaptedBase
from finetuning.model.base import FrozenBase, load_base
from finetuning.model.decoding import Decoder
from finetuning.model.digest import base_files, files_digest, require_same_base
from finetuning.model.packed_linear import can_pack
from finetuning.model.prefix_cache import PrefixCache
from finetuning.model.state_store import LAYOUT, KeptStates
from finetuning.rows.chat_format import EncodedRow, prompt_ids
from finetuning.safety_rows.invented import safety_rows
from finetuning.safety_rows.operator_file import load_safety_rows
from finetuning.safety_rows.roles import Pair, SafetyRows
from finetuning.training.batches import StepRows
from finetuning.training.checkpoint import fingerprint
from finetuning.training.determinism import mix, secret_draw
from finetuning.training.state import TrainSetup
from finetuning.training.strategies import GradientStep, RowWeigher

_ANCHOR_PROMPTS = 48


@dataclass
class JobContext:
    """The job's parts. `operator_rows` are the safety rows by role; `secret` is what hidden draws are made with.

    `given`: an adapter that was trained elsewhere, in the place of training."""

    recipe: Recipe
    model: AdaptedBase
    measuring: Measuring
    reader: RefusalReader
    operator_rows: SafetyRows
    secret: str = field(default="", repr=False)
    given: lora.Adapter | None = None
    _anchors: dict[int, KlAnchors] = field(default_factory=dict)  # by kl_tokens: scout and training share them

    def hidden_draw(self, purpose: str) -> str:
        """Where draws begin that a customer must not foretell (methods.md 1, rule 3); the same in every attempt."""
        return secret_draw(self.secret, purpose, self.recipe.seed)

    def stock_refusals(self) -> list[tuple[int, ...]]:
        """The stock refusals as answer ids, end token included."""
        rows = self.model.encode_operator([Pair("?", refusal) for refusal in self.operator_rows.refusals])
        return [row.ids[row.prompt_tokens :] for row in rows]

    def anchors(self, settings: AnchorSettings) -> KlAnchors:
        """The aligned model's own first tokens on operator prompts that it refuses, with its log-probabilities.

        None are made when the KL weighs nothing.
        """
        if not settings.kl_weight:
            return KlAnchors.none()
        if settings.kl_tokens not in self._anchors:
            model = self.model
            refused = self.operator_rows.aligned[:_ANCHOR_PROMPTS]
            with model.aligned():
                self._anchors[settings.kl_tokens] = make_anchors(
                    model.base, model.cache, model.decoder,
                    [tuple(prompt_ids(model.tokenizer, pair.prompt)) for pair in refused],
                    tokens=settings.kl_tokens, refused_first={word[0] for word in self.reader.refusal_starts},
                )  # fmt: skip
        return self._anchors[settings.kl_tokens]

    def anchored_step(
        self,
        settings: AnchorSettings,
        *,
        seed: int,
        refused: Sequence[EncodedRow] = (),
        answered: Sequence[EncodedRow] = (),
    ) -> Anchored:
        """The finetune step: weighted user loss, mixed operator rows, KL anchors. All strengths 0 equal Plain.

        `refused` and `answered` join the operator's rows that are mixed in.
        """
        encode = self.model.encode_operator
        return Anchored(
            self.model.base, self.model.cache, settings,
            refusals=[*encode(self.operator_rows.aligned), *refused],
            benign=[*encode(self.operator_rows.benign), *answered],
            anchors=self.anchors(settings), seed=seed,
        )  # fmt: skip

    def training(
        self,
        rows: Sequence[EncodedRow],
        step: GradientStep,
        weigher: RowWeigher,
        *,
        batches: StepRows,
        steps: int,
        optimiser: OptimiserSettings | None = None,
        lines: Sequence[int] = (),
    ) -> TrainSetup:
        """A ready TrainSetup over the trained adapter, which saves nothing yet; the loop is seeded as the batches."""
        return TrainSetup(
            rows=rows, batches=batches, step=step, weigher=weigher,
            parameters=self.model.parameters, dropouts=self.model.dropouts, steps=steps, seed=batches.seed,
            optimiser=optimiser or self.recipe.optimiser, micro_batch_size=self.recipe.micro_batch_size, lines=lines,
        )  # fmt: skip


def open_job(order: TrainOrder, scratch: Path) -> JobContext:
    """Load the base and attach the job's adapters. Raises OtherBase, UnknownLayers, AdapterMismatch, BadOperatorRows,
    BadGuard, JudgeUnreachable, OSError."""
    recipe = order.recipe
    if order.alignment is not None:
        require_same_base(scratch / order.alignment, base_files(order.base, order.base_sha256))
    base = load_base(order.base, device=order.device)
    rows = _safety_rows(order, scratch)
    trained = lora.ALIGNMENT if order.alignment is None else lora.TASK
    given: lora.Adapter | None = None
    if order.alignment is None:
        cut = lora.first_trained_layer(base, recipe.lora)
        lora.attach(base, trained, recipe.lora, seed=mix(recipe.seed, "init"))
        lora.set_active(base, (trained,))
    else:
        given = lora.load(scratch / order.adapter) if order.adapter is not None else None
        recipe = recipe if given is None else recipe.model_copy(update={"lora": lora.lora_of(given, base)})
        cut = _attach_both(base, recipe, lora.load(scratch / order.alignment))
    lora.set_trainable(base, trained)
    cache = PrefixCache(base, cut, folder=scratch / order.cache if order.cache else None, kept=_kept_states(order, cut))
    untrained = lora.read(base, trained)
    model = AdaptedBase(base, cache, Decoder(base, cache), trained, untrained, recipe.max_tokens)
    declines = refusal_reader(rows)
    guard = open_judge(order.judge, device=order.device, declines=declines) if order.judge else None
    measuring = Measuring(model, RULES[rows.judge](declines), recipe.evaluation.new_tokens, guard)
    reader = RefusalReader(model, refusal_starts(base.tokenizer, rows.refusals))
    # Without an operator's secret, in library use, the alignment that only the operator has must do.
    secret = order.secret or ("" if order.alignment is None else model.alignment_digest())
    return JobContext(recipe, model, measuring, reader, rows, secret, given)


def _safety_rows(order: TrainOrder, scratch: Path) -> SafetyRows:
    """The operator's own, or the shipped ones with as many gate prompts as the recipe asks."""
    if order.operator_rows:
        return load_safety_rows(scratch / order.operator_rows)
    asked = order.recipe.evaluation
    return safety_rows(gate=(asked.harmful_rows, asked.benign_rows), everyday=order.recipe.everyday_rows)


def _attach_both(base: FrozenBase, recipe: Recipe, alignment: lora.Adapter) -> int:
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
    made_of = {"base": files, "cut": str(cut), "form": LAYOUT, "device": order.device, "packed": str(can_pack())}
    of_all = fingerprint(made_of, threads=torch.get_num_threads())
    return KeptStates(Path(order.states) / of_all[:16])
