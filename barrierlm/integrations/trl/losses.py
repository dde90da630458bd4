"""SFT and DPO with constraints on what the loss is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer, SFTTrainer

from barrierlm import BarrierObjective, Constraint

from ..hooks import ConstrainsLoss, sample_count
from .base import Commit, ConstrainedTrainer, make_objective
from .batch import Batch, PreferenceBatch


class ConstrainedLoss(ConstrainsLoss, ConstrainedTrainer):
    r"""Mixin before SFTTrainer or DPOTrainer: minimise the loss, keep averages of what is measured within bounds.

    .. math:: \text{loss} + \sum_k w_k \, \text{mean of measurement}_k

    The mean is that of all samples of an optimizer step, over micro-batches and ranks, exactly. Evaluation adds
    nothing to the loss and changes nothing; it logs the averages as ``eval_constraints/<name>/value``.

    Args:
        *args: Of the trainer.
        constraints: Bounds on averages; or a `BarrierObjective` of them, for another rule.
        measurements: By constraint name, a function of a `Batch` (a `PreferenceBatch` for DPO) that returns a tensor
            with gradient: [n], one value per sequence (per pair) of the micro-batch; or 0-d, taken as exact; or None:
            not measured in this micro-batch.
        num_samples: By constraint name, for measurements [n] of another n, and for those that only some of a step's
            micro-batches make: a function of a micro-batch's inputs (columns included) that returns n, for a 0-d value
            any number but 0, and 0 for None. It is called before the step, to know the step's total. What is left out
            unannounced pulls the constraint's gradient to 0, and is warned of.
        columns: Dataset columns that measurements need.
        **kwargs: Of the trainer.

    Raises:
        ValueError: Measurements that are not those of the constraints; columns that cannot be kept.

    Example:
        >>> class MyTrainer(ConstrainedLoss, SFTTrainer): ...

    Source: L3Ms (arXiv 2410.21533).
    """

    #: Rows of ``input_ids`` that make a sample.
    _rows_per_sample = 1

    def __init__(
        self,
        *args: Any,
        constraints: Sequence[Constraint] | BarrierObjective,
        measurements: Mapping[str, Callable[[Any], Tensor | None]],
        num_samples: Mapping[str, Callable[[Mapping[str, Any]], int | Tensor]] | None = None,
        columns: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.objective = make_objective(constraints, "measurements", measurements)
        self._measurements = {c.name: measurements[c.name] for c in self.objective.constraints}
        self._num_samples = dict(num_samples or {})
        unknown = self._num_samples.keys() - self._measurements.keys()
        if unknown:
            raise ValueError(f"num_samples has {min(unknown)!r}; allowed: constraints, {list(self._measurements)}")
        if isinstance(columns, str):
            raise ValueError(f"columns={columns!r}; allowed: a list of names")
        self._columns = tuple(columns)
        super().__init__(*args, **kwargs)
        self._check_ranks()
        if self._columns:
            if getattr(self.args, "packing", False):
                raise ValueError(f"columns={columns!r} with packing=True; allowed: packing=False (packing drops them)")
            for name in self._columns:
                if name not in (self.train_dataset.column_names or [name]):
                    raise ValueError(f"columns has {name!r}; allowed: those of the dataset, as the trainer prepared it")
            self._collate_columns()
        self._evaluated: dict[str, Tensor] = {}
        self.add_callback(Commit(self))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The Trainer's micro-batches of a step; how many samples they hold over all ranks is noted."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = [[self._expected(name, inputs) for inputs in batches] for name in self._measurements]
        counts = torch.tensor([[sum(numbers), sum(n > 0 for n in numbers)] for numbers in own], device=device)
        total = self.accelerator.reduce(counts, reduction="sum")
        #: By constraint: samples, and micro-batches that have some, which is what exact values are averaged over.
        self._window_samples, self._window_batches = (
            dict(zip(self._measurements, numbers.unbind(), strict=True)) for numbers in total.unbind(1)
        )
        return batches, num_items

    def _expected(self, name: str, inputs: Mapping[str, Any]) -> int:
        """Samples of this constraint in a micro-batch, told from its inputs."""
        if name in self._num_samples:
            return sample_count(f"num_samples[{name!r}]", self._num_samples[name](inputs))
        return len(inputs["input_ids"]) // self._rows_per_sample

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss; while training, with the constraints."""
        columns = {name: inputs.pop(name) for name in self._columns if name in inputs}
        passes: list[Any] = []
        with ExitStack() as hooks:
            for module in {id(m): m for m in (self._unwrapped(model), getattr(self, "ref_model", None)) if m}.values():
                hook = module.register_forward_hook(lambda module, args, output: passes.append(output))
                hooks.callback(hook.remove)
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = self._batch(model, inputs, passes, columns)
        with self._measuring():
            measured = {name: value for name, f in self._measurements.items() if (value := f(batch)) is not None}
        if not torch.is_grad_enabled():
            self._note_evaluation(measured)
            return result
        loss, *outputs = result if return_outputs else (result,)
        loss = self._combined(loss, measured, self._is_scaled(num_items_in_batch), batch, columns)
        return (loss, *outputs) if return_outputs else loss

    def _combined(
        self, loss: Tensor, measured: dict[str, Tensor], scaled: bool, batch: Batch, columns: dict[str, Any]
    ) -> Tensor:
        totals = {}
        for name in self._measurements:
            value = measured.get(name)
            if not isinstance(value, Tensor) and (value is not None or name not in self._num_samples):
                continue  # `combine` says what is wrong with it, or nothing was announced
            exact = value is not None and value.dim() == 0
            number = 0 if value is None else 1 if exact else len(value)
            expected = self._expected(name, {**batch.inputs, **columns})
            if number != expected and not (exact and expected):
                raise ValueError(
                    f"measurements[{name!r}] returned {number} values in a micro-batch of {expected} samples; allowed: "
                    f"one for each, or a mean (0-d), or num_samples={{{name!r}: how many, from the inputs}}"
                )
            if value is not None:
                totals[name] = (self._window_batches if exact else self._window_samples)[name]
        steps = self.current_gradient_accumulation_steps
        before = steps if scaled else 1  # a loss that the Trainer does not divide is made one that it would
        out = self.objective.combine(loss * before, measured, num_samples_in_window=totals, loss_divisor=steps)
        self._measured = True
        return out.loss / before

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model)

    def _batch(self, model: nn.Module, inputs: dict[str, Any], passes: list[Any], columns: dict[str, Any]) -> Batch:
        return Batch(model, inputs, _fused(passes[0]), columns)

    def _note_evaluation(self, measured: dict[str, Tensor]) -> None:
        for name, value in measured.items():
            sums = torch.stack([value.sum(), value.new_tensor(value.numel())]).float()
            self._evaluated[name] = self._evaluated.get(name, 0) + sums

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the averages of an evaluation."""
        if not self.model.training:
            for name in self._measurements:
                sums = self._evaluated.get(name, torch.zeros(2, device=self.accelerator.device))
                total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
                if count:
                    logs[f"eval_constraints/{name}/value"] = total / count
            self._evaluated = {}
        super().log(logs, *args, **kwargs)


def _fused(outputs: Any) -> Any:
    if getattr(outputs, "log_probs", None) is None:
        raise RuntimeError(
            f"the trainer's own pass returned a {type(outputs).__name__} without log_probs; allowed: trainers that use "
            "TRL's fused LM head (trl >= 1.16), without label smoothing or a compute_loss_func"
        )
    return outputs


class BarrierSFTTrainer(ConstrainedLoss, SFTTrainer):
    """TRL's SFTTrainer with constraints.

    Args:
        args: As for SFTTrainer, as are ``kwargs``; ``constraints``, ``measurements`` (of a `Batch`),
            ``num_samples`` and ``columns`` are those of `ConstrainedLoss`.

    Raises:
        ValueError: See `ConstrainedLoss`.

    Example:
        >>> issubclass(BarrierSFTTrainer, SFTTrainer)
        True
    """


class BarrierDPOTrainer(ConstrainedLoss, DPOTrainer):
    """TRL's DPOTrainer with constraints.

    Args:
        args: As for DPOTrainer, as are ``kwargs``; ``constraints``, ``measurements`` (of a `PreferenceBatch`),
            ``num_samples`` and ``columns`` are those of `ConstrainedLoss`.

    Raises:
        ValueError: See `ConstrainedLoss`.

    Example:
        >>> issubclass(BarrierDPOTrainer, DPOTrainer)
        True
    """

    _rows_per_sample = 2

    def _batch(self, model: nn.Module, inputs: dict[str, Any], passes: list[Any], columns: dict[str, Any]) -> Batch:
        # The policy's pass, then the reference's (by the same model without its adapter, or another one).
        policy = _fused(passes[0])
        chosen, rejected = policy.log_probs.sum(1).chunk(2)
        if "ref_chosen_logps" in inputs:
            if self.ld_alpha is not None:
                raise ValueError(
                    f"ld_alpha={self.ld_alpha} with precompute_ref_log_probs=True and constraints; allowed: without "
                    "precompute_ref_log_probs (what it keeps is weighted by ld_alpha, and no log-probability)"
                )
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = _fused(passes[1]).log_probs.detach().sum(1).chunk(2)
        return PreferenceBatch(model, inputs, policy, columns, chosen, rejected, ref_chosen, ref_rejected)
