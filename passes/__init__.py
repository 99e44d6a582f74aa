"""Graph passes on pre-dispatch ATen, usable without the backend: by other compilers, on `torch.export` programs.

    retrace -> find_regions -> insert_observers -> choose -> fold_tensors -> lower, with verify_* after each

Each is a function of a graph (or a region) and settings; what it could not do it says, with the reason.
"""

from pq_fx.passes.channels import propagate
from pq_fx.passes.choose import Settings, choose
from pq_fx.passes.fold import axis_index, fold_tensors
from pq_fx.passes.lower import lower
from pq_fx.passes.moments import Moments
from pq_fx.passes.observe import insert_observers
from pq_fx.passes.regions import Point, Region, RegionMap, find_regions
from pq_fx.passes.retrace import parameter_inputs, retrace
from pq_fx.passes.rounding import gptq, second_moment
from pq_fx.passes.select import Linear, select
from pq_fx.passes.verify import verify_folds, verify_graph

__all__ = [
    "Linear",
    "Moments",
    "Point",
    "Region",
    "RegionMap",
    "Settings",
    "axis_index",
    "choose",
    "find_regions",
    "fold_tensors",
    "gptq",
    "insert_observers",
    "lower",
    "parameter_inputs",
    "propagate",
    "retrace",
    "second_moment",
    "select",
    "verify_folds",
    "verify_graph",
]
