"""Every error that vlkit raises on purpose.

    VlkitError
    ├── ConfigError, UnknownModelError, MissingDependencyError, BackendError, NonFiniteError
    ├── LayoutError, PlaceholderMismatchError, EmptyBatchError, SequenceTooLongError, TokenError
    ├── ImageError, VideoError, TemplateError
    ├── CheckpointError ── CorruptCheckpointError, UnsafePathError, KeyMismatchError, NonFiniteWeightsError, DiskFullError
    ├── SampleError, RankError
    └── OptimizerStateError

Each class is also the usual built-in, so code that catches ValueError or OSError keeps working. A message says what was found,
what was expected, where (file, key, item), and the way out.
"""


class VlkitError(Exception):
    """Base of all errors that vlkit raises on purpose."""


class ConfigError(VlkitError, ValueError):
    """A config field has a wrong type or value, is unknown, or does not fit its neighbours."""


class UnknownModelError(VlkitError, LookupError):
    """A name is not registered; the message lists the nearest names."""


class MissingDependencyError(VlkitError, ImportError):
    """An optional package is needed; the message says what to install."""


class BackendError(VlkitError, RuntimeError):
    """A kernel was asked for by name and cannot run these inputs on this machine."""


class LayoutError(VlkitError, ValueError):
    """A layout contradicts itself or the tensor that it describes."""


class PlaceholderMismatchError(VlkitError, ValueError):
    """The text has another number of image placeholders than the tower gives tokens."""


class EmptyBatchError(VlkitError, ValueError):
    """A batch holds nothing to compute."""


class SequenceTooLongError(VlkitError, ValueError):
    """A sequence is longer than the model's positions."""


class TokenError(VlkitError, ValueError):
    """A token id lies outside the vocabulary, or a text cannot be tokenised."""


class ImageError(VlkitError, ValueError):
    """An image cannot be read or prepared; the message names its index or path."""


class VideoError(VlkitError, ValueError):
    """A video cannot be read or prepared; the message names its index or path."""


class TemplateError(VlkitError, ValueError):
    """A conversation or a chat template cannot be rendered."""


class NonFiniteError(VlkitError, ArithmeticError):
    """A model gives NaN where a number is needed."""


class CheckpointError(VlkitError, OSError):
    """A checkpoint folder cannot be read or written."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint file is truncated, is not what its name says, or contradicts its index."""


class UnsafePathError(CheckpointError, ValueError):
    """A file name in a checkpoint would leave its folder."""


class KeyMismatchError(CheckpointError, KeyError):
    """Names or shapes in a checkpoint do not fit the model; the message is a grouped report."""

    def __str__(self) -> str:  # KeyError would print the repr, with \n written out
        return str(self.args[0]) if self.args else ""


class NonFiniteWeightsError(CheckpointError, ValueError):
    """A loaded tensor holds NaN or infinity."""


class DiskFullError(CheckpointError):
    """There is not enough free space; the message says how many bytes are needed."""


class SampleError(VlkitError, ValueError):
    """A sample of a data set cannot be used; the message names its file and line."""


class RankError(VlkitError, RuntimeError):
    """A rank of a run died, hangs, stopped with an error, or was started differently."""


class OptimizerStateError(VlkitError, ValueError):
    """An optimizer state does not belong to these parameters."""


class UnknownFieldWarning(UserWarning):
    """A config.json has fields without an effect in vlkit; `from_pretrained(strict_config=True)` refuses them."""
