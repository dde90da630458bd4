"""transformers' Trainer with constraints: `BarrierTrainer`, and the mixin that makes one of any subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from barrierlm import BarrierObjective, Sampled
from barrierlm.distributed import sum_over_ranks

from .checkpoint import SavesObjective
from .hooks import ConstrainsLoss, sample_count

try:
    from transformers import Trainer, TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"barrierlm.integrations.transformers needs the package {error.name or 'transformers'!r}, which is not "
        "installed; get it with: pip install 'barrierlm[transformers]'"
    ) from error

if TYPE_CHECKING:

    class _Base(Trainer):
        """What the mixin's `super()` is, for the type checker."""
else:
    _Base = object

#: ``(model, inputs, outputs) -> measurements by constraint name``.
Measure = Callable[[Any, Mapping[str, Any], Any], Mapping[str, Tensor | Sampled]]


class BarrierMixin(ConstrainsLoss, SavesObjective, _Base):
    """Adds constraints to a Trainer class: mixin before `transformers.Trainer` or a subclass of it.

    Args:
        objective: See `BarrierTrainer`, as for ``measure``, ``columns`` and ``num_samples``.

    Raises:
        TypeError, ValueError: See `BarrierTrainer`.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> class MyTrainer(BarrierMixin, Seq2SeqTrainer): ...
    """

    def __init__(
        self,
        *args: Any,
        objective: BarrierObjective,
        measure: Measure,
        columns: Sequence[str] = (),
        num_samples: Callable[[Mapping[str, Any]], Mapping[str, int]] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(objective, BarrierObjective):
            raise TypeError(f"objective is a {type(objective).__name__}; allowed: a BarrierObjective")
        if objective.loss_fn is not None:
            raise ValueError(
                f"objective has loss_fn={objective.loss_fn!r}; allowed: None (the Trainer computes the loss; give it "
                "compute_loss_func for another)"
            )
        for argument, function in (("measure", measure), ("num_samples", num_samples)):
            if not callable(function) and (argument == "measure" or function is not None):
                raise TypeError(f"{argument} is a {type(function).__name__}; allowed: a function")
        if isinstance(columns, str):
            raise TypeError(f"columns={columns!r}; allowed: a list of column names")
        self.objective, self.measure = objective, measure
        self._columns, self.num_samples = tuple(columns), num_samples
        self._window_counts: dict[str, int] = {}
        self._rows_in_window: int | None = None
        self._one_per_row = dict.fromkeys((c.name for c in objective.constraints), True)
        self._task_sum, self._task_windows = 0.0, 0
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel); allowed: one process per GPU, started with "
                "torchrun or accelerate launch"
            )
        self._check_ranks()
        self._collate_columns()
        self.add_callback(_Commit(self))

    # ---- what a batch is -------------------------------------------------------------------------------

    def _for_model(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in self._columns}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The window's micro-batches, as the Trainer's; counts their samples over all processes."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        rows = [_rows(batch) for batch in batches]
        given = [self._announced(batch) for batch in batches]
        names = list(self._one_per_row)  # the same on all ranks, whatever each announces
        counts = [float(all(n is not None for n in rows)), float(sum(n or 0 for n in rows))]
        counts += [float(sum(batch.get(name, 0) for batch in given)) for name in names]
        counts += [float(any(name in batch for batch in given)) for name in names]
        total = sum_over_ranks(torch.tensor(counts, dtype=torch.float64), self.objective.process_group).tolist()
        known, of_rows, numbers, announced = total[0], total[1], total[2 : 2 + len(names)], total[2 + len(names) :]
        self._rows_in_window = int(of_rows) if int(known) == self.args.world_size else None
        self._window_counts = {name: int(n) for name, n, any_ in zip(names, numbers, announced, strict=True) if any_}
        return batches, num_items

    def _announced(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """What ``num_samples`` says of a micro-batch."""
        if self.num_samples is None:
            return {}
        given, names = self.num_samples(batch), list(self._one_per_row)
        if not isinstance(given, Mapping):
            raise TypeError(f"num_samples returned a {type(given).__name__}; allowed: numbers by constraint name")
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"num_samples returned a number for {unknown[0]!r}; allowed: constraints, {names}")
        return {name: sample_count(f"num_samples, for {name!r},", n) for name, n in given.items()}

    # ---- the loss --------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's own loss, in training with the constraints added; see `Trainer.compute_loss`."""
        kwargs["num_items_in_batch"] = num_items_in_batch
        if not torch.is_grad_enabled():  # evaluation: nothing is measured, and eval_loss stays the task's
            return super().compute_loss(model, self._for_model(inputs), return_outputs, **kwargs)
        missing = [name for name in self._columns if name not in inputs]
        if missing:
            raise ValueError(f"columns={list(self._columns)}, but the dataset has no {missing[0]!r}")
        task_loss, outputs = super().compute_loss(model, self._for_model(inputs), return_outputs=True, **kwargs)
        with self._measuring():
            measurements = self.measure(model, inputs, outputs)
        if not isinstance(measurements, Mapping):
            raise TypeError(
                f"measure returned a {type(measurements).__name__}; allowed: measurements by constraint name"
            )
        # The window has k micro-batches. training_step divides the loss by k, unless it takes it to be scaled
        # already; what is combined is always a loss that is still to be divided by k.
        k = self.current_gradient_accumulation_steps
        factor = k if self._is_scaled(num_items_in_batch) else 1
        out = self.objective.combine(
            task_loss * factor,
            measurements,
            num_samples_in_window=self._expected(measurements, _rows(inputs)),
            loss_divisor=k,
        )
        self._task_sum = self._task_sum + out.task_loss / k
        loss = out.loss / factor
        return (loss, outputs) if return_outputs else loss

    def _expected(self, measurements: Mapping[str, Any], rows: int | None) -> dict[str, int]:
        """``num_samples_in_window``: what ``num_samples`` said, and the rows for what is measured once per row."""
        expected = {name: n for name, n in self._window_counts.items() if name in measurements}
        for name, value in measurements.items():
            if name in expected or name not in self._one_per_row:
                continue
            one_each = isinstance(value, Sampled | Tensor) and _size(value) == rows
            self._one_per_row[name] &= one_each and self._rows_in_window is not None
            if self._one_per_row[name] and self._rows_in_window is not None:
                expected[name] = self._rows_in_window
        return expected

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, without the columns that only constraints read."""
        return super().prediction_step(model, self._for_model(inputs), *args, **kwargs)

    # ---- logs and checkpoints --------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the objective's metrics, and ``loss/task``, to the logs of training."""
        if "loss" in logs and self._task_windows:
            # Not filtered by logging_nan_inf_filter: a task loss that is not finite shows here.
            task = torch.as_tensor(self._task_sum, dtype=torch.float64).reshape(1) / self._task_windows
            logs |= {"loss/task": float(sum_over_ranks(task, self.objective.process_group)) / self.args.world_size}
            logs |= self.objective.metrics() | getattr(self.measure, "metrics", dict)()
            self._task_sum, self._task_windows = 0.0, 0
        super().log(logs, *args, **kwargs)


class BarrierTrainer(BarrierMixin, Trainer):
    """transformers' Trainer that keeps averages within bounds.

    Takes the Trainer's arguments, and the four below. The loss is the Trainer's own (the model's, a
    ``compute_loss_func``, label smoothing) plus the constraints; one window is one optimizer step, right under gradient
    accumulation, short last windows and several processes. Skipped fp16 steps are forgotten, evaluation changes
    nothing, the objective's state lies in each checkpoint (``objective.pt``) and comes back with
    ``resume_from_checkpoint``, and its metrics are in the Trainer's logs.

    Args:
        args: All positional arguments are the Trainer's, as are further keywords.
        objective: With ``loss_fn=None``: the Trainer computes the loss.
        measure: ``(model, inputs, outputs) -> measurements``, called on every micro-batch of training after the
            forward pass: the wrapped model, the batch with its ``columns``, and what the model returned. For
            responses sampled in the loop give a `barrierlm.integrations.rollouts.Rollouts`.
        columns: Dataset columns that ``measure`` reads. They are kept by ``remove_unused_columns``, collated apart from
            the others (numbers to tensors [B], equal shapes stacked, the rest as lists) and never shown to the model.
        num_samples: ``(batch) -> {name: number of samples}`` that a micro-batch will give, for constraints that are not
            measured once per row. Makes their means exact when micro-batches differ; without it they count equally. A
            constraint that only some of a step's micro-batches measure needs it (1 for an exact value, 0 or nothing
            where it is left out): what is not announced pulls the gradient to 0.

    Raises:
        TypeError: An argument of the wrong kind; what ``measure`` or ``num_samples`` returned.
        ValueError: Several GPUs in one process; processes that the Trainer does not know of; an ``objective`` with a
            ``loss_fn``.

    Example:
        >>> from barrierlm.integrations.logits import entropy
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> trainer = BarrierTrainer(
        ...     LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
        ...     TrainingArguments("runs", max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no"),
        ...     train_dataset=[{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 8,
        ...     objective=BarrierObjective(None, [Constraint("entropy", lower=2.0)]),
        ...     measure=lambda model, inputs, outputs: {"entropy": entropy(outputs.logits, inputs["labels"])},
        ... )
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> trainer.objective.report()[0].verdict
        'met'

    Source: transformers' Trainer, whose ``compute_loss`` and checkpoint hooks it extends.
    """


def _rows(batch: Mapping[str, Any]) -> int | None:
    """Number of rows of a batch; None where one row packs several sequences."""
    first = next((value for value in batch.values() if isinstance(value, Tensor) and value.dim()), None)
    packed = (
        "cu_seq_lens_q" in batch or "seq_idx" in batch or ("position_ids" in batch and "attention_mask" not in batch)
    )
    return None if first is None or packed else first.shape[0]


def _size(measurement: Tensor | Sampled) -> int | None:
    """Number of samples; None for a value without sampling noise."""
    return len(measurement) if isinstance(measurement, Sampled) or measurement.dim() else None


class _Commit(TrainerCallback):
    """Commits a window after every optimizer step that was taken."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_hyper_param_search:
            raise RuntimeError("hyperparameter search with constraints; allowed: a new trainer and objective per trial")
        self.trainer.objective.discard_window()  # of a run that was interrupted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.objective.discard_window()
        else:
            self.trainer.objective.step()
        self.trainer._task_windows += 1
