"""The folder of a training run: what an interrupted run left there, and whether it may go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lanerank.calibration import CALIBRATION_FILE
from lanerank.errors import InputError
from lanerank.template import LOCAL_CONTRACT
from lanerank.training.card import CARD_FILE
from lanerank.training.config import EMBEDDED_MODEL, TrainingConfig
from lanerank.training.report import REPORT_FILE, DataFile

CHECKPOINTS = "checkpoints"
"""The folder for checkpoints, inside that of the model, until the run is finished."""

_RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
"""Where a checkpoint of `Trainer` says how far it is; written last."""
_WITHOUT_EFFECT = ("output", "calibrate", "card")
"""Fields that may change between an interrupted run and its continuation."""
_MODEL_FILES = (
    *(
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
    ),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "chat_template.jinja", LOCAL_CONTRACT),
)
_WRITTEN = (*_MODEL_FILES, CALIBRATION_FILE, REPORT_FILE, CARD_FILE)


def check_folder(config: TrainingConfig, data: Sequence[DataFile], *, restart: bool) -> Path | None:
    """Whether a run may take the folder, in which nothing changes yet.

    Args:
        config: What is to be trained.
        data: The files to train and measure on.
        restart: Begin afresh, whatever an earlier run left.

    Returns:
        The last complete checkpoint, where the same run was interrupted there.

    Raises:
        InputError: The folder holds something else.
    """
    output, checkpoints = config.output, config.output / CHECKPOINTS
    record, report = checkpoints / _RUN_FILE, output / REPORT_FILE
    known = record.is_file() or _is_report(report)
    if not known and any(not path.is_dir() for path in output.rglob("*")):
        raise InputError(
            f"`output` {str(output)!r} holds files that no training run wrote; give a new folder"
        )
    if restart:
        return None
    if report.is_file():
        raise InputError(
            f"`output` {str(output)!r} holds a model that is trained; give a new folder, or "
            "restart (`--restart`) to replace it"
        )
    complete = {step: path for path, step in _steps(checkpoints).items() if step}
    if not complete:
        return None
    before, run = json.loads(record.read_text(encoding="utf-8")), _run(config, data)
    fields = run["config"]
    changed = [name for name in fields if before["config"].get(name) != fields[name]]
    changed += ["train` or `dev"] if before["data"] != run["data"] else []
    if changed:
        raise InputError(
            f"`output` {str(output)!r} holds an interrupted run with another "
            f"`{'`, `'.join(changed)}`; put that back, give a new folder, or restart "
            "(`--restart`)"
        )
    return complete[max(complete)]


def take_folder(
    config: TrainingConfig, data: Sequence[DataFile], last: Path | None, *, restart: bool
) -> None:
    """Delete what the run does not go on from, and write down which run this is.

    Args:
        config: As for `check_folder`.
        data: As for `check_folder`.
        last: What `check_folder` returned.
        restart: As for `check_folder`.
    """
    checkpoints = config.output / CHECKPOINTS
    if restart:
        _delete_run(config.output)
    for path, step in _steps(checkpoints).items():
        if step is None:
            shutil.rmtree(path, ignore_errors=True)
    if last is None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_run(config, data), indent=2)
        (checkpoints / _RUN_FILE).write_text(f"{text}\n", encoding="utf-8")


def _run(config: TrainingConfig, data: Sequence[DataFile]) -> dict[str, Any]:
    """What a continuation must have in common with the run that it continues."""
    # Relative, so that a folder that was moved with its data goes on.
    fields = config.relative_to(config.output.parent).model_dump(
        mode="json", exclude={*_WITHOUT_EFFECT, "train", "dev"}
    )
    if config.injection is not None:
        # What is injected decides about the weights, not what the file is called.
        fields["injection"]["attacks"] = digest(config.injection.attacks, "injection.attacks")
    # So it is with what training starts from.
    fields["model"] = _digests(config.model)
    if config.contract is not None and config.contract.endswith(".json"):
        fields["contract"] = digest(Path(config.contract), "contract")
    return {"config": fields, "data": [each.sha256 for each in data]}


def _digests(model: str) -> dict[str, str]:
    """The SHA-256 of each file of a starting model; none where there is no such folder."""
    embedded = model == EMBEDDED_MODEL
    folder = Path(str(files("lanerank"))) / "models" / model if embedded else Path(model)
    found = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.name: digest(path, "model") for path in sorted(found)}


def _steps(checkpoints: Path) -> dict[Path, int | None]:
    """The step of each checkpoint; none where the run was killed before it was complete."""
    steps: dict[Path, int | None] = {}
    for path in checkpoints.glob("checkpoint-*/"):
        try:
            steps[path] = json.loads((path / STATE_FILE).read_text("utf-8"))["global_step"]
        except (FileNotFoundError, ValueError):
            steps[path] = None
    return steps


def _delete_run(output: Path) -> None:
    """Delete what a run writes, and nothing else."""
    for pattern in _WRITTEN:
        for path in output.glob(pattern):
            path.unlink()
    delete_checkpoints(output)


def delete_checkpoints(output: Path) -> None:
    """Delete what only an interrupted run needs; what cannot be deleted stays."""
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)


def _is_report(path: Path) -> bool:
    """Whether a file is the report of a training run, of this release of lanerank or another."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() >= {"config", "best_step", "evaluations"}


def is_over(checkpoint: Path) -> bool:
    """Whether training had ended, by its length or early, when a checkpoint was written."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def digest(path: Path, field: str) -> str:
    """The SHA-256 of a file that a field of the configuration names.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"`{field}`: {str(path)!r} cannot be read: {error.strerror}; give a file that is there"
        ) from error
