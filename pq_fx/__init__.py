"""pq_fx: PermuQuant (arXiv 2605.09503) as a torch.compile backend.

4-bit and 3-bit weights and activations for diffusion transformers, training-free, found and folded by graph passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pq_fx import integrations, requirements  # noqa: F401 - requirements checks versions before the rest
from pq_fx.backend import permuquant
from pq_fx.checkpoint import load, save
from pq_fx.config import QuantConfig
from pq_fx.dequantize import dequantize
from pq_fx.inspection import inspect
from pq_fx.inspection_report import Inspection
from pq_fx.quantizer import Quantizer, prepare
from pq_fx.regional import compile_blocks
from pq_fx.report import Report
from pq_fx.seen import allow_hooks, allow_input

if TYPE_CHECKING:
    from pq_fx.integrations.diffusers import PermuQuantConfig

__all__ = [
    "Inspection",
    "PermuQuantConfig",
    "QuantConfig",
    "Quantizer",
    "Report",
    "allow_hooks",
    "allow_input",
    "compile_blocks",
    "dequantize",
    "inspect",
    "load",
    "permuquant",
    "prepare",
    "save",
]
__version__ = "0.1.0"

integrations.install()


def __getattr__(name: str) -> Any:
    if name == "PermuQuantConfig":  # a subclass of diffusers' own, which is imported only now
        from pq_fx.integrations.diffusers import PermuQuantConfig

        return PermuQuantConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
