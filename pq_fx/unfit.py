"""Models that cannot be quantized as they are, refused by name before anything is changed.

hooks around parts (hooks.py)                     the graph breaks at each
quantized already, also by another quantizer      its channels are in another order
a PEFT adapter on it                              its A and B are linears of their own; it belongs to the float model
parameters of a tensor subclass (DTensor, ...)    their values are spread over processes, or in another format
parameters without data (meta)                    nothing to pack
"""

from __future__ import annotations

from torch import nn

from pq_fx.errors import CalibrationError
from pq_fx.hooks import refuse_wrapped_parts
from pq_fx.modules import QuantLinear
from pq_fx.passes._torch import is_traceable_wrapper_subclass


def refuse_unfit(model: nn.Module, *, data: bool = False) -> None:
    """Raise CalibrationError for a model of these kinds; one without data is refused only where `data` is needed."""
    refuse_wrapped_parts(model)
    kind = type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            raise CalibrationError(
                f"{kind} is converted already ({name} is quantized); calibration and conversion need the float model"
            )
        if any(c.__name__ == "BaseTunerLayer" for c in type(module).__mro__):
            raise CalibrationError(
                f"{name} carries a LoRA adapter of PEFT. Take it off (pipe.unload_lora_weights()) and load it again "
                "after conversion, as a side branch; or fuse it first (pipe.fuse_lora(); pipe.unload_lora_weights())"
            )
    for name, p in model.named_parameters():
        if is_traceable_wrapper_subclass(p):
            raise CalibrationError(
                f"{name} is a {type(p).__name__} and no plain tensor: quantize {kind} before it is sharded "
                "(fully_shard) or quantized by another library"
            )
        if data and p.is_meta:
            raise CalibrationError(
                f"{name} is on the meta device and has no values to pack: load the weights of {kind} first"
            )
