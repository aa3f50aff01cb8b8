"""Every error that atomsteer raises on purpose, as one tree.

Messages follow one form: the value that was met, the limit it broke, and the remedy. The server maps classes to
HTTP statuses in one table (`server/errors.py`); the command line prints the message and exits with status 2.

    AtomsteerError
    ├── ConfigError              a setting that cannot work
    ├── DataError                documents or prompts that cannot be read
    ├── ModelError               a base model that cannot be used
    ├── AdapterError             a LoRA adapter that cannot be used
    ├── StorageError             a disk that is full, or a path that cannot be written
    ├── RankError                a process of a shared discovery has ended before its work
    ├── PackageError             a package that cannot be read or written
    │   ├── PackageCorruptError  a file is missing, truncated or edited
    │   └── WrongBaseError       made for another base model or another base adapter
    ├── MixError                 a mix that cannot be applied; `param` names the request field
    │   ├── UnknownAtomError
    │   ├── CoefficientError     non-finite, or outside the atom's tested range
    │   └── DriftBudgetError     predicted KL above `max_kl`
    ├── UnknownDetectorError
    └── EngineError              generation failed
        ├── EngineOverloadedError   the queue is full; `retry_after` seconds
        ├── GrammarError            a grammar that cannot be compiled, or grew beyond its bounds while it was followed
        ├── RequestTooLongError     prompt + max_tokens over the context; `param` names the request field
        └── EngineStoppedError      the engine is shutting down or has died
"""


class AtomsteerError(Exception):
    """Base of all errors that atomsteer raises on purpose."""


class ConfigError(AtomsteerError):
    """A setting that cannot work."""


class DataError(AtomsteerError):
    """Documents or prompts that cannot be read; the message names file and line."""


class ModelError(AtomsteerError):
    """A base model that cannot be loaded or steered."""


class AdapterError(AtomsteerError):
    """A LoRA adapter that cannot be used, with the reason by name."""


class StorageError(AtomsteerError):
    """A disk that is full, or a path that cannot be written."""


class RankError(AtomsteerError):
    """A process of a shared discovery has ended before its work was done."""


class PackageError(AtomsteerError):
    """A package that cannot be read or written."""


class PackageCorruptError(PackageError):
    """A package file is missing, truncated or edited."""


class WrongBaseError(PackageError):
    """The package was made for another base model or another base adapter."""


class MixError(AtomsteerError):
    """A mix that cannot be applied. `param` is the request field at fault, such as ``steering.atoms``."""

    def __init__(self, message: str, param: str = "steering") -> None:
        super().__init__(message)
        self.param = param


class UnknownAtomError(MixError):
    """No atom of the package has this id or alias."""


class CoefficientError(MixError):
    """A coefficient that is not finite or lies outside the atom's tested range."""


class DriftBudgetError(MixError):
    """The predicted KL of the mix exceeds the request's `max_kl`."""


class UnknownDetectorError(AtomsteerError):
    """No detector has this name."""


class EngineError(AtomsteerError):
    """Generation failed."""


class EngineOverloadedError(EngineError):
    """The queue is full. `retry_after` is the advised wait in seconds, None where the engine cannot say."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class GrammarError(EngineError):
    """A grammar that an answer was to follow cannot be compiled, or grew beyond its bounds while it was followed."""


class RequestTooLongError(EngineError):
    """Prompt plus requested tokens exceed the context. `param` is the request field at fault."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


class EngineStoppedError(EngineError):
    """The engine is shutting down or has died."""
