"""What backward passes have to know about the graph that they run in."""

import torch


def graph_is_kept() -> bool:
    """Whether saved tensors may be needed again: the running backward was called with retain_graph=True.

    True as well where torch cannot tell, and while torch.compile traces (it decides about memory by itself).
    """
    if torch.compiler.is_compiling():
        return True
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else bool(probe())
