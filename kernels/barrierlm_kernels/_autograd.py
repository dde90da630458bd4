"""What backward passes have to know about the graph that they run in."""

import torch
from torch import Tensor


def may_overwrite(saved: Tensor) -> bool:
    """Whether a backward pass may write its result over a tensor that was saved for it.

    Not if the tensor may be needed again (backward was called with retain_graph=True, or torch cannot tell), and
    not while a compiler traces, which decides about memory by itself: it uses subclasses of Tensor.
    """
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    kept = True if probe is None or torch.compiler.is_compiling() else bool(probe())
    return not kept and type(saved) is Tensor and saved.is_contiguous()
