"""What makes a resumed run the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from .config import leaves
from .data import Tokens
from .options import Options


def same_run(options: Options, train: Sequence[Tokens], processes: int) -> dict[str, Any]:
    """Everything that a resumed run must agree in with the one that was stopped, by name.

    Args:
        options: All count, but those marked ``may_differ`` in `Options`.
        train: The training pairs, which count by their content: the data order is a function of step and seed, and
            says nothing about what it orders.
        processes: Their number.
    """
    digest = hashlib.sha256()
    for pair in train:
        digest.update(repr((pair.prompt_ids, pair.response_ids, sorted(pair.pair.columns.items()))).encode())
    own = {key: value for key, spec, value in leaves(options) if not spec.metadata.get("may_differ")}
    return own | {"processes": processes, "training data": digest.hexdigest()}
