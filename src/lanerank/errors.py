"""The exceptions lanerank raises on purpose.

* LanerankError
  x InputError (also ValueError)         an argument or a line of a file is not usable
    + FileFormatError                    a file's line; carries `path` and `line`
  x InstructionError (also ValueError)
    + InstructionNotSupportedError       the model has no channel for the instruction it was given
    + InstructionMissingError            an instruction was required and no source gave one
  x ModelError (also RuntimeError)
    + ModelLoadError                     weights or configuration are missing, corrupt or refused
    + ScorerError                        a scorer did not give one number for each candidate
      - RemoteError                      nor did a service; carries `service`, `url` and `status`
    + JudgeError                         a judge gave no usable answer; carries `judge` and `cost`
  x BulkError (also RuntimeError)        a run over a data set cannot begin or go on
  x MissingExtraError (also ImportError) an optional dependency is not installed

Every message names the argument, shows the value it had, and says what to do instead.
"""

from __future__ import annotations

from pathlib import Path


class LanerankError(Exception):
    """Base class of every exception that lanerank raises on purpose."""


class InputError(LanerankError, ValueError):
    """An argument is not usable; the message names it and says what is expected."""


class FileFormatError(InputError):
    """A line of an input file is not usable.

    Attributes:
        path: The file, or `<stdin>`.
        line: The line number, counted from 1.
    """

    def __init__(self, path: str | Path, line: int, problem: str) -> None:
        """Build the message `path:line: problem`."""
        super().__init__(f"{path}:{line}: {problem}")
        self.path = str(path)
        self.line = line


class InstructionError(LanerankError, ValueError):
    """An instruction cannot be used as asked."""


class InstructionNotSupportedError(InstructionError):
    """The model has no instruction channel, and the caller did not choose a fallback."""


class InstructionMissingError(InstructionError):
    """An instruction is required, and none of the allowed sources gave one."""


class ModelError(LanerankError, RuntimeError):
    """A model cannot be loaded or does not behave as its contract says."""


class ModelLoadError(ModelError):
    """Weights or configuration are missing, corrupt, or refused for safety."""


class ScorerError(ModelError):
    """A scorer returned something other than one number for each candidate."""


class RemoteError(ScorerError):
    """A service could not be reached, refused, or gave an answer that is not usable.

    Attributes:
        service: The name of the service's contract.
        url: The address that was asked; it holds no secret.
        status: The HTTP status, or `None` where no whole answer arrived.
        retry_after: The seconds that the service asks to wait, `None` if it does not.
    """

    def __init__(
        self,
        message: str,
        *,
        service: str = "",
        url: str = "",
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Keep the facts beside the message."""
        super().__init__(message)
        self.service = service
        self.url = url
        self.status = status
        self.retry_after = retry_after


class JudgeError(ModelError):
    """A judge gave no usable answer to a question.

    Attributes:
        judge: The judge's name.
        cost: What its attempts took, a `lanerank.training.Cost`.
    """

    def __init__(self, message: str, *, judge: str = "", cost: object = None) -> None:
        """Keep the facts beside the message."""
        super().__init__(message)
        self.judge = judge
        self.cost = cost


class BulkError(LanerankError, RuntimeError):
    """A run over a data set cannot begin or go on; what it has done is kept."""


class MissingExtraError(LanerankError, ImportError):
    """An optional dependency is not installed; the message has the `pip install` line."""
