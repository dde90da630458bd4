"""What Trainers with a constrained loss share: dataset columns that only constraints read, and who divides the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .costs import brief

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object  # a mixin: the trainer comes after it


class ConstrainsLoss(_Base):
    """Mixin before a transformers Trainer whose ``compute_loss`` adds constraints."""

    #: Dataset columns that are kept for the constraints.
    _columns: tuple[str, ...] = ()
    data_collator: Any

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._columns if name not in self._signature_columns]

    def _collate_columns(self) -> None:
        """Put the columns beside what the trainer's own collator makes of the others."""
        if self._columns:
            self.data_collator = _CollateColumns(self.data_collator, self._columns)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Around calls of a measurement: a column that was never asked for shows up there as a bare KeyError."""
        try:
            yield
        except KeyError as error:
            error.add_note(f"Of the dataset's columns a measurement gets those named in columns={list(self._columns)}")
            raise

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether training_step leaves the loss as it is; says what `Trainer.training_step` says."""
        own = getattr(self, "loss_is_scaled_for_ga", None)
        if own is not None:
            return bool(own)
        return bool((self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func)


def sample_count(argument: str, given: Any) -> int:
    """The number of samples that a function of the user's, named ``argument``, has returned.

    Raises:
        TypeError, ValueError: It is none.
    """
    if not isinstance(given, Real) and not (isinstance(given, Tensor) and given.numel() == 1):
        raise TypeError(f"{argument} returned {brief(given)}; allowed: a whole number >= 0")
    number = float(given)
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"{argument} returned {brief(given)}; allowed: a whole number >= 0")
    return int(number)


class _CollateColumns:
    """A collator that sees only what it knows, with the columns put beside its batch."""

    def __init__(self, collator: Callable[[list[Any]], Any], columns: tuple[str, ...]) -> None:
        self.collator, self.columns = collator, columns

    def __call__(self, features: list[Mapping[str, Any]]) -> Any:
        batch = self.collator([{k: v for k, v in row.items() if k not in self.columns} for row in features])
        for name in self.columns:
            if all(name in row for row in features):  # an evaluation set may do without
                batch[name] = _stack([row[name] for row in features])
        return batch


def _stack(values: list[Any]) -> Any:
    if all(isinstance(value, bool | int | float) for value in values):
        return torch.tensor(values)
    if all(isinstance(value, Tensor) and value.shape == values[0].shape for value in values):
        return torch.stack(values)
    return values
