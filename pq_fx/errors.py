"""The errors of pq_fx: each says what was found, what was expected and what to do."""

from __future__ import annotations


class PQError(Exception):
    """Base of every error that pq_fx raises on purpose."""


class ConfigError(PQError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class FormatError(PQError, ValueError):
    """A number format is unknown, or a tensor does not fit it (channels not a multiple of the group)."""


class UnsupportedDeviceError(PQError, RuntimeError):
    """A device cannot run the wanted formats; the message names the device and what to use."""


class DeviceMemoryError(PQError, RuntimeError):
    """A device ran out of memory; the message says how much was wanted. Nothing was changed."""


class UnsupportedVersionError(PQError, ImportError):
    """An installed package is of a version that pq_fx does not work with; the message says which does."""


class GraphError(PQError, RuntimeError):
    """A graph breaks a rule that the passes rely on; nothing was changed."""


class CalibrationError(PQError, RuntimeError):
    """Statistics are missing, not finite, or do not belong to this model."""


class CheckpointError(PQError, RuntimeError):
    """A saved model is damaged, of another version, or of another architecture."""


class UnseenError(PQError, RuntimeError):
    """A quantized model is given a tensor, or enters a branch, that no call of its calibration had."""


class LoraError(PQError, RuntimeError):
    """An adapter cannot be used with a quantized model; the message names the way that works."""


class PipelineError(PQError, RuntimeError):
    """A pipeline cannot be loaded, drawn with as asked, or written where asked."""


class InterchangeError(PQError, ValueError):
    """A model does not fit another program's layout exactly; the message says which part and what to do."""
