"""pq_fx: PermuQuant (arXiv 2605.09503) as a torch.compile backend.

4-bit and 3-bit weights and activations for diffusion transformers, training-free, found and folded by graph passes.
"""

from __future__ import annotations

from pq_fx.backend import permuquant
from pq_fx.checkpoint import load, save
from pq_fx.config import QuantConfig
from pq_fx.inspection import inspect
from pq_fx.inspection_report import Inspection
from pq_fx.quantizer import Quantizer, prepare
from pq_fx.report import Report

__all__ = [
    "Inspection",
    "QuantConfig",
    "Quantizer",
    "Report",
    "inspect",
    "load",
    "permuquant",
    "prepare",
    "save",
]
__version__ = "0.1.0"
