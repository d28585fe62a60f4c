"""The training loop, by transformers' `Trainer`: groups in, a saved and measured model out.

On a CPU in float32 a run is a function of its configuration, its data and the versions of torch and
transformers: two runs give the same bits, also where one of them was interrupted and resumed. On
other devices, or in lower precision, sums may be taken in another order.

Weights are read and written as safetensors only. The checkpoints of `Trainer` also hold torch
pickles: optimiser, schedule and random state, which transformers reads with `weights_only=True`,
and `training_args.bin`, which nobody reads. They are deleted when a run ends; the saved model has
none.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from lanerank.calibration import Calibrator
from lanerank.checkpoint import load_scorer
from lanerank.contracts import Lane
from lanerank.errors import InputError, MissingExtraError, ModelError
from lanerank.evaluation.attacks import read_attacks
from lanerank.evaluation.measures import FloatArray
from lanerank.reranker import Reranker
from lanerank.scoring.modeling_lane_encoder import LaneEncoder, trust
from lanerank.training.backends import Backend, load_backend
from lanerank.training.card import write_card
from lanerank.training.collate import Batch, GroupCollator, count_terms, losses_of
from lanerank.training.config import TrainingConfig
from lanerank.training.development import (
    DevelopmentReport,
    judged,
    measure_groups,
    score_rows,
)
from lanerank.training.groups import Group, Row, add_attacks, make_groups
from lanerank.training.quadruples import read_quadruples
from lanerank.training.report import (
    REPORT_FILE,
    DataFile,
    Evaluation,
    TrainingReport,
    selection,
)
from lanerank.training.run_folder import (
    CHECKPOINTS,
    STATE_FILE,
    check_folder,
    delete_checkpoints,
    digest,
    is_over,
    take_folder,
)

_KEPT_CHECKPOINTS = 2
_SELECTION = "eval_selection"

OnEvaluation = Callable[[int, DevelopmentReport], None]


class GroupTrainer(Trainer):
    """`Trainer` over groups: the losses of their rows, and measures in place of an evaluation loss.

    Args:
        backend: The model.
        config: Loss weights, learning rates and what selects a checkpoint.
        arguments: The rest of what `Trainer` is told.
        groups: To train on.
        development: To evaluate on.
        on_evaluation: Called with the step and the report of every evaluation.
        callbacks: As in `Trainer`.
    """

    def __init__(
        self,
        backend: Backend,
        config: TrainingConfig,
        arguments: TrainingArguments,
        groups: Sequence[Group],
        development: Sequence[Group],
        *,
        on_evaluation: OnEvaluation | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Prepare the optimiser; `train` begins."""
        self.backend = backend
        self.config = config
        self.development = development
        self._on_evaluation = on_evaluation
        self._sums: dict[str, float] = {}
        self._batches = 0
        super().__init__(
            model=backend.model,
            args=arguments,
            data_collator=cast("Callable[[list[Group]], dict[str, Any]]", GroupCollator(backend)),
            train_dataset=_Groups(groups),
            eval_dataset=_Groups(development),
            optimizers=(_optimizer(backend, config), None),
            callbacks=list(callbacks),
        )
        # Losses are means over a batch; Trainer divides them by the number of accumulated ones.
        self.loss_is_scaled_for_ga = False
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the signature of Trainer
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The weighted sum of the losses.

        Raises:
            ModelError: A loss is NaN or infinite.
        """
        logits = self.backend.logits(model, inputs["inputs"])
        losses = losses_of(logits, cast("Batch", inputs), self.config.loss_weights)
        for name, loss in losses.items():
            value = loss.item()
            if not math.isfinite(value):
                # Before the gradient, which would make every weight NaN.
                raise self._diverged(self.state.global_step + 1, f"the loss `{name}` is {value}")
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._batches += 1
        total = torch.stack(list(losses.values())).sum()
        return (total, logits) if return_outputs else total

    def evaluate(
        self,
        eval_dataset: Dataset[Group] | dict[str, Dataset[Group]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the model on the development groups, whatever data set is given.

        Raises:
            ModelError: As for `measure`.
        """
        report = self.measure(calibration=False)
        metrics = {_SELECTION: selection(report, self.config)}
        metrics |= {
            f"eval_loss_{name}": value / self._batches for name, value in self._sums.items()
        }
        self._sums, self._batches = {}, 0
        if self._on_evaluation is not None:
            self._on_evaluation(self.state.global_step, report)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def measure(self, *, calibration: bool = True) -> DevelopmentReport:
        """The measures of the model as it would be used; see `DevelopmentReport`.

        Raises:
            ModelError: A score is NaN or infinite.
        """
        nn.Module.eval(self.backend.model)
        scores = [self._scores(group) for group in self.development]
        report = measure_groups(self.development, scores, calibration=calibration)
        if report.non_finite:
            what = f"{report.non_finite} of {report.rows} scores on `dev` are NaN or infinite"
            raise self._diverged(self.state.global_step, what)
        return report

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: groups have no length in tokens that `Trainer` could read."""
        return 0

    def _scores(self, group: Group) -> FloatArray:
        scores = []
        # As many at a time as fit in training, where gradients need room too.
        size = self.config.groups_per_batch * self.config.documents_per_group
        for start in range(0, len(group.rows), size):
            with self.compute_loss_context_manager():
                rows = self._heard(group.rows[start : start + size])
                inputs = self._prepare_inputs(self.backend.inputs(rows))
                logits = self.backend.logits(self.backend.model, inputs)
            scores.append(logits.double().sigmoid().cpu().numpy())
        return np.concatenate(scores)

    def _heard(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows without the instructions that the model, when it is used, leaves out."""
        model = self.backend.model
        instructed = [row for row in rows if row.instruction]
        if not isinstance(model, LaneEncoder) or not instructed:
            return rows
        inputs = self._prepare_inputs(self.backend.inputs(instructed))
        instruction, query = inputs["instruction_ids"], inputs["query_ids"]
        pad = model.config.pad_token_id
        above = model.encode_trusted(Lane.INSTRUCTION, instruction, instruction != pad)
        trusted = trust(model.encode_trusted(Lane.QUERY, query, query != pad, above), above)
        counts = iter(model.counts(trusted)[inputs["group"]].tolist())
        return [
            row if not row.instruction or next(counts) else replace(row, instruction="")
            for row in rows
        ]

    def _diverged(self, step: int, what: str) -> ModelError:
        if not step:
            return ModelError(
                f"`model` {self.config.model!r}: {what} before training; start from another model"
            )
        body, head = self.config.rates
        rates = f"`learning_rate` ({body:g})"
        if self.config.kind != "causal_lm":
            rates += f" or `head_learning_rate` ({head:g})"
        return ModelError(
            f"at step {step} {what}: training diverged. Lower {rates}, or look for odd rows in "
            "`train` (`lanerank data check`); then give a new folder or restart (`--restart`). "
            "The checkpoints of earlier steps are kept."
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing over the caller's own progress; it has one switch for all."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    # The switch moves that of the hub too.
    hub_was_silent = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        if hub_was_silent:
            disable_progress_bars()


@_without_bars()
def train(
    config: TrainingConfig,
    *,
    restart: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> TrainingReport:
    """Train, measure and save a model; a run that was interrupted goes on when called again.

    The folder `config.output` gets the weights with tokenizer and contract, `calibration.json`,
    `training.json` and a model card, `README.md`. Its `checkpoints`, from which an interrupted run
    goes on, are deleted at the end. Nothing is printed, and no bar of transformers is drawn.

    Args:
        config: From `read_config`.
        restart: Begin afresh. What an earlier run left in the folder is deleted when data and
            starting model have been read and checked.
        progress: Called after each step with the number done and the number in all.
        on_evaluation: Called with the step and its report; first with 0 and the starting model.

    Returns:
        The report, as in `training.json`.

    Raises:
        InputError: The data or the folder cannot be used, or a run with another configuration,
            other data or another starting model was interrupted there.
        MissingExtraError: A package is missing.
        ModelLoadError: The starting model cannot be loaded.
        ModelError: A loss or a score is NaN or infinite, so that there is nothing to save.
    """
    _require("accelerate", "sklearn")
    checkpoints = config.output / CHECKPOINTS
    data = [
        DataFile(name=path.name, sha256=digest(path, field))
        for field, paths in (("train", config.train), ("dev", config.dev))
        for path in paths
    ]
    last = check_folder(config, data, restart=restart)
    set_seed(config.seed)
    dev_rows = read_quadruples(config.dev)
    development = make_groups(dev_rows, min_gap=config.min_gap)
    groups, rows = _training_groups(config)
    _keep_apart(groups, development)
    # Outside the folder of the model, which a run takes only when all else is checked.
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch, _deterministic():
        backend = load_backend(config, Path(scratch))
        for group in (*groups, *development):
            _check_rows(backend, group)
        terms = count_terms(groups, config.loss_weights)
        if not any(terms.values()):
            raise InputError(
                f"`losses`: none with a weight has anything to compare in `train`: {terms}"
            )
        trainer = GroupTrainer(
            backend,
            config,
            _arguments(config, checkpoints),
            groups,
            development,
            on_evaluation=on_evaluation,
            callbacks=_callbacks(config, progress),
        )
        before = trainer.measure()
        selection(before, config)
        take_folder(config, data, last, restart=restart)
        if on_evaluation is not None and last is None:
            on_evaluation(0, before)
        if last is not None and is_over(last):
            # Interrupted between the last step and the end, and Trainer would take one more.
            state = TrainerState.load_from_json(str(last / STATE_FILE))
            backend.restore(checkpoints / f"checkpoint-{state.best_global_step}")
        else:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            state = trainer.state
        nn.Module.eval(backend.model)
        backend.save(config.output, _contract_facts(config))
    scorer = load_scorer(
        config.output, device=config.device, dtype=config.precision, calibrated=False
    )
    # Cross-encoders were trained to read the instruction before the query.
    scores = score_rows(Reranker(scorer, on_unsupported="prepend"), dev_rows)
    calibrator, reason = _calibrate(config, development, scores)
    report = TrainingReport(
        config=config.relative_to(config.output.parent),
        data=tuple(data),
        versions={"torch": torch.__version__, "transformers": version("transformers")},
        queries=len({group.query_key for group in groups}),
        rows=rows,
        terms=terms,
        steps=state.global_step,
        best_step=state.best_global_step,
        stopped_early=state.global_step < state.max_steps,
        evaluations=_evaluations(state),
        before=before,
        after=measure_groups(development, scores),
        calibrator=calibrator,
        not_calibrated=reason,
    )
    write_card(config.output, report)
    # Last, because where it is a run is complete.
    text = report.model_dump_json(indent=2)
    (config.output / REPORT_FILE).write_text(f"{text}\n", encoding="utf-8")
    delete_checkpoints(config.output)
    return report


class _Groups(Dataset[Group]):
    """Groups by number, as a data loader takes them."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> Group:
        return self.groups[number]


class _EvaluateAtTheEnd(TrainerCallback):
    """The last step is evaluated, whatever the interval; not every release of Trainer does that."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class _Progress(TrainerCallback):
    """Tells after each step how far training is."""

    def __init__(self, told: Callable[[int, int], None]) -> None:
        self.told = told

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.told(state.global_step, state.max_steps)


def _callbacks(
    config: TrainingConfig, progress: Callable[[int, int], None] | None
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [_EvaluateAtTheEnd()]
    if config.patience is not None:
        callbacks.append(EarlyStoppingCallback(config.patience))
    if progress is not None:
        callbacks.append(_Progress(progress))
    return callbacks


def _arguments(config: TrainingConfig, checkpoints: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs or 1,
        per_device_train_batch_size=config.groups_per_batch,
        gradient_accumulation_steps=config.accumulate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup,  # below 1 it is a share
        max_grad_norm=config.clip_norm,
        bf16=config.precision == "bfloat16",
        fp16=config.precision == "float16",
        use_cpu=config.device == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        eval_strategy="steps",
        eval_steps=config.evaluate_every,
        save_strategy="steps",
        save_steps=config.evaluate_every,
        save_total_limit=_KEPT_CHECKPOINTS,
        load_best_model_at_end=True,
        metric_for_best_model=_SELECTION,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _optimizer(backend: Backend, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with a rate for the body and one for the head; vectors do not decay."""
    body, head = config.rates
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in backend.model.named_parameters():
        if parameter.requires_grad:
            rate = head if backend.is_head(name) else body
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ]
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sums in a fixed order where torch has a way to; else it warns."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode=True, warn_only=torch.cuda.is_available())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=before, warn_only=warn_before)


def _training_groups(config: TrainingConfig) -> tuple[list[Group], int]:
    quadruples = read_quadruples(config.train)
    groups = make_groups(
        quadruples,
        min_gap=config.min_gap,
        documents=config.documents_per_group,
        seed=config.seed,
        horizontal="horizontal" in config.loss_weights,
    )
    if config.injection is not None:
        suite = read_attacks(config.injection.attacks)
        groups = add_attacks(groups, suite, share=config.injection.share, seed=config.seed)
    return groups, len(quadruples)


def _keep_apart(groups: Sequence[Group], development: Sequence[Group]) -> None:
    """Refuse data without rows, and development rows that are trained on."""
    for name, each in (("train", groups), ("dev", development)):
        if not each:
            raise InputError(f"`{name}` has no rows; give files of quadruples")
    seen = {_identity(row) for group in groups for row in group.rows}
    shared = [row for group in development for row in group.rows if _identity(row) in seen]
    if shared:
        raise InputError(
            f"`dev` has {len(shared)} rows that `train` has too, the first for the query "
            f"{shared[0].query[:60]!r}; what was trained on cannot measure"
        )


def _identity(row: Row) -> tuple[str, str, str]:
    return row.query, row.instruction, row.candidate.text


def _check_rows(backend: Backend, group: Group) -> None:
    for row in group.rows:
        try:
            backend.check(row)
        except InputError as error:
            raise InputError(f"query {group.query_key[:60]!r}: {error}") from error


def _evaluations(state: TrainerState) -> tuple[Evaluation, ...]:
    prefix = "eval_loss_"
    return tuple(
        Evaluation(
            step=entry["step"],
            selection=entry[_SELECTION],
            losses={
                name.removeprefix(prefix): value
                for name, value in entry.items()
                if name.startswith(prefix)
            },
        )
        for entry in state.log_history
        if _SELECTION in entry
    )


def _calibrate(
    config: TrainingConfig, development: Sequence[Group], scores: Sequence[FloatArray]
) -> tuple[Calibrator | None, str | None]:
    """The calibrator, saved, or why there is none: the data may not settle one."""
    if config.calibrate == "none":
        return None, None
    note = f"{config.output.name} on {len(development)} development queries"
    try:
        calibrator = Calibrator.fit(*judged(development, scores), config.calibrate, note=note)
    except InputError as error:
        return None, str(error)
    calibrator.save(config.output)
    return calibrator, None


def _contract_facts(config: TrainingConfig) -> dict[str, Any]:
    return {
        "licence": config.card.licence or "unknown",
        "languages": ", ".join(config.card.languages) or "unknown",
        "sources": (),
        "verified": f"written by the training run; measures are in {REPORT_FILE}",
    }


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"training needs {' and '.join(missing)}, not installed here. "
            'Install the extra: pip install "lanerank[train]"'
        )
