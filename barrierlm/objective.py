"""`BarrierObjective`: ties constraints, estimates, rule and schedule together; nothing else."""

from __future__ import annotations

import math
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .barriers import Rule
from .certificate import Certificate, certify
from .checks import check_call, check_sums
from .committed import Committed, numbers
from .constraints import Bounds, Constraint
from .current import barrier_terms
from .diagnostics import Report
from .distributed import gathered, world_size
from .estimators import EMA, Column, rows_of
from .learning import AdaptiveBarrier
from .output import ObjectiveOutput
from .packing import PackedBatch
from .probe import GradientProbe
from .sampling import Measured, Sampled, measure, stacks, structure
from .schedules import AdaptiveSchedule, Schedule
from .window import Window

Measurements = Mapping[str, Tensor | Sampled]
#: What was measured, by the constraints of each stack.
_Stacks = dict[tuple[int, ...], Measured]

#: Calls without a single `step()` after which the loop is told; more micro-batches than most windows have.
_CALLS_BEFORE_WARNING = 32
#: Windows in a row without a sample of a constraint after which the loop is told.
_WINDOWS_BEFORE_WARNING = 100


class BarrierObjective:
    r"""Minimise a loss while keeping averages within bounds.

    .. math:: \min_\theta L(\theta) \quad \text{s.t.} \quad \text{lower}_k \le \mathbb{E}[v_k] \le
              \text{upper}_k

    Each committed window gives every bound a violation z and, by the rule, a multiplier
    :math:`\lambda = B'(z)`. A call then returns the linear surrogate

    .. math:: L + \sum_k w_k v_k, \qquad w_k = (\lambda_k^\text{upper} - \lambda_k^\text{lower}) /
              \text{scale}_k

    in value and gradient, where :math:`v_k` is the micro-batch's share of the window's mean. All of a window
    uses the multipliers committed before it, so the first window only measures (unless `calibrate` was called).

    Args:
        loss_fn: Any callable that returns a 0-d tensor, or None when there is only `combine`, or no task.
        constraints: `Constraint` objects with distinct names; at least one.
        rule: How a violation becomes a multiplier. Default `AdaptiveBarrier`.
        schedule: How mu falls. Default `AdaptiveSchedule`. Ignored by rules that have a mu of their own.
        estimator: `EMA` (default, smoothing 0.1) or `BatchMean`.
        noise_floor: s stays above this many standard errors, and mu above its root; 0 switches it off.
        confidence: Draws sampled bounds in by this many standard errors of a mean over 200 windows, so that their
            averages stay within them for more of the time, but by no more than a quarter of the width where one
            `Constraint` has both bounds (two constraints on one quantity know nothing of each other).
            `AdaptiveBarrier` has it where it learns; reports keep to the bounds as given. Default: the rule's own, 0.5
            for rules that learn multipliers on a barrier and 0 for the others.
        normalize: Divide the loss by 1 + sum of the multipliers, so that a large one does not make large gradients.
        multiplier: ``"committed"``, or ``"current"``: loss is L + B(z) at this call's own values,
            differentiated by autograd; for exact, single-process work with one call per window.
        nonfinite: What `step` does when a measurement held a NaN or an infinity: ``"raise"``, or ``"skip"``
            that constraint's window. Neither lets it into an estimate or into the loss.
        gradient_reduction: How the loop combines the ranks' gradients: ``"mean"`` (DDP) or ``"sum"``.
        process_group: The ranks that share a window; default: the default group where there is one.

    Raises:
        TypeError: An argument of the wrong kind.
        ValueError: No constraint, a duplicate name, or an option outside its range.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> objective = BarrierObjective(torch.nn.functional.mse_loss, [Constraint("mean", upper=0.5)])
        >>> for _ in range(2):
        ...     prediction = model(torch.randn(8, 3))
        ...     out = objective(prediction, torch.randn(8, 1), measurements={"mean": prediction.mean()})
        ...     out.loss.backward()
        ...     objective.step()
        >>> sorted(out.metrics())[:2]
        ['barrier/mu', 'barrier/penalty']

    Source: L3Ms (arXiv 2410.21533), equation of the relaxed barrier objective; ARCHITECTURE.md.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor] | None,
        constraints: Sequence[Constraint],
        *,
        rule: Rule | None = None,
        schedule: Schedule | None = None,
        estimator: EMA | None = None,
        noise_floor: float = 1.0,
        confidence: float | None = None,
        normalize: bool = False,
        multiplier: str = "committed",
        nonfinite: str = "raise",
        gradient_reduction: str = "mean",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn is a {type(loss_fn).__name__}; allowed: a callable or None")
        if not isinstance(constraints, Iterable):
            raise TypeError(f"constraints is a {type(constraints).__name__}; allowed: a list of Constraint objects")
        constraints = list(constraints)
        if not constraints:
            raise ValueError("constraints is empty; allowed: at least one Constraint")
        if not (isinstance(noise_floor, int | float) and noise_floor >= 0 and math.isfinite(noise_floor)):
            raise ValueError(f"noise_floor={noise_floor!r}; allowed: a finite number >= 0 (0 switches it off)")
        if confidence is not None and not (
            isinstance(confidence, int | float) and confidence >= 0 and math.isfinite(confidence)
        ):
            raise ValueError(f"confidence={confidence!r}; allowed: a finite number >= 0, or None for the rule's own")
        choices = (
            ("multiplier", multiplier, ("committed", "current")),
            ("nonfinite", nonfinite, ("raise", "skip")),
            ("gradient_reduction", gradient_reduction, ("mean", "sum")),
            ("normalize", normalize, (False, True)),
        )
        for argument, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{argument}={value!r}; allowed: {' or '.join(map(repr, allowed))}")
        if normalize and multiplier == "current":
            raise ValueError("normalize=True with multiplier='current'; allowed: with multiplier='committed'")
        parts = (("rule", rule, Rule), ("schedule", schedule, Schedule), ("estimator", estimator, EMA))
        for argument, part, kind in parts:
            if part is not None and not isinstance(part, kind):
                raise TypeError(f"{argument} is {part!r}; allowed: an instance of a {kind.__name__}")
            if part is not None and getattr(part, "_in_use", False):
                raise ValueError(
                    f"{argument} already belongs to another objective; allowed: a new {type(part).__name__}"
                )
        self.loss_fn = loss_fn
        self.rule = rule or AdaptiveBarrier()
        self.schedule = schedule or AdaptiveSchedule()
        self.estimator = estimator or EMA()
        self.noise_floor = float(noise_floor)
        self.confidence = self.rule.confidence if confidence is None else float(confidence)
        self.normalize = normalize
        self.multiplier = multiplier
        self.nonfinite = nonfinite
        self.gradient_reduction = gradient_reduction
        self.process_group = process_group
        for owned in (self.rule, self.schedule, self.estimator):
            owned._in_use = True  # type: ignore[union-attr]
        self._committed = Committed(
            Bounds(constraints), self.rule, self.schedule, self.estimator, self.noise_floor, self.confidence
        )
        mark = zlib.crc32(repr(self._committed.bounds.fingerprint()).encode()) % 2**20  # hash() differs by process
        self._window = Window(len(constraints), mark)
        self._warned: set[str] = set()
        self._unmeasured = [0] * len(constraints)  # windows in a row

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The constraints, in the order given."""
        return self._committed.bounds.constraints

    @property
    def windows(self) -> int:
        """Number of windows committed by `step`."""
        return self._committed.windows

    @property
    def weights(self) -> dict[str, float]:
        """The committed w_k by constraint name: what a unit of its value weighs in the loss, where the task weighs 1.

        For what makes the gradients itself, as a trainer that takes weighted rewards (there the weight is -w_k); see
        `measure`. 0 before anything was measured.
        """
        return dict(zip(self._committed.bounds.names, self._committed.weights, strict=True))

    # ---- calling it ------------------------------------------------------------------------------------

    def __call__(
        self,
        *args: Any,
        measurements: Measurements | None = None,
        num_samples_in_window: Mapping[str, int | Tensor] | None = None,
        loss_divisor: float = 1,
        **kwargs: Any,
    ) -> ObjectiveOutput:
        """``loss_fn(*args, **kwargs)`` combined with the measurements; see `combine`.

        Args:
            *args: For ``loss_fn``.
            measurements: See `combine`.
            num_samples_in_window: See `combine`.
            loss_divisor: See `combine`.
            **kwargs: For ``loss_fn``.

        Returns:
            An `ObjectiveOutput`; call ``.loss.backward()``.

        Raises:
            TypeError: Arguments for a ``loss_fn`` that is None; see `combine`.
            ValueError: See `combine`.
        """
        measurements, num_samples_in_window = measurements or {}, num_samples_in_window or {}
        self._check_call(measurements, num_samples_in_window, loss_divisor)
        if self.loss_fn is not None:
            task_loss = self.loss_fn(*args, **kwargs)
        elif args or kwargs:
            raise TypeError("loss_fn is None, so it takes no arguments; allowed: measurements=... alone, or combine()")
        else:
            task_loss = None
        return self._combine(task_loss, measurements, num_samples_in_window, loss_divisor)

    def combine(
        self,
        task_loss: Tensor | None,
        measurements: Measurements | None = None,
        *,
        num_samples_in_window: Mapping[str, int | Tensor] | None = None,
        loss_divisor: float = 1,
    ) -> ObjectiveOutput:
        """A loss already computed, combined with the measurements of this micro-batch.

        Args:
            task_loss: 0-d floating tensor, passed through unchanged; None: no task.
            measurements: By constraint name: a `Sampled`; a floating tensor [n] of per-sample values with
                gradient; or a 0-d tensor with gradient (exact). A name may be missing, n may be 0.
            num_samples_in_window: By constraint name, the number of samples (sequences) that the whole window
                will have, over all micro-batches and ranks. Makes the mean exact when they differ in size;
                without it micro-batches and ranks count equally, and an empty one pulls the gradient to 0.
            loss_divisor: What the loop divides this loss by before ``backward`` (gradient accumulation);
                used together with ``num_samples_in_window``.

        Returns:
            An `ObjectiveOutput`; call ``.loss.backward()``.

        Raises:
            TypeError: Something that is no measurement, integer values.
            ValueError: An unknown name, a wrong shape, a tensor without gradient while gradients are on.
            RuntimeError: ``multiplier="current"`` with several ranks.
        """
        measurements, num_samples_in_window = measurements or {}, num_samples_in_window or {}
        self._check_call(measurements, num_samples_in_window, loss_divisor)
        return self._combine(task_loss, measurements, num_samples_in_window, loss_divisor)

    def linear(
        self,
        hidden: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        measurements: Measurements | None = None,
        *,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        compact: bool = False,
        num_samples_in_window: Mapping[str, int | Tensor] | None = None,
        loss_divisor: float = 1,
        impl: str = "auto",
        memory_budget: int | None = None,
        vocab_parallel: Any = None,
    ) -> ObjectiveOutput:
        r"""Task and sampled constraints in one pass over the LM head, never an [N, V] tensor.

        .. math:: L = -\sum_i t_i \log p_i, \qquad
                  \nabla \text{loss} = \sum_i \Big(\sum_k w_k a_{ki} - t_i\Big) \nabla \log p_i

        The same as `combine` with the token log-probabilities of this batch, in value, gradient and committed
        state, to round-off: the advantages a (times their share of the window) come from costs and committed
        estimates alone, so the weight of every token is known before the head runs. 6 N V H operations, where a
        loss on log-probabilities needs 8.

        An importance ratio (``old_logps``) and a KL need log-probabilities before that. Where a `Sampled` does not
        bring them as ``logps``, a forward-only pass over the sampled rows computes them: 2 V H operations a row.

        Costs and hidden states that are not finite drop their constraints, as in `combine`. A log-probability that
        only the head makes infinite shows when the gradient is made: it is kept out of the estimates and counted,
        and the loss is NaN.

        Args:
            hidden: Last hidden states [N, H], floating: row i predicts ``batch.targets[i]``.
            weight: LM head [V, H], dtype of ``hidden`` (autocast may mix dtypes). A DTensor that FSDP2 shards is
                gathered, and its gradient reduced as ``gradient_reduction`` says; then every rank must call.
            batch: What the rows are, and their weights in the task loss.
            measurements: As for `combine`, but a `Sampled` is about the batch's sampled sequences and leaves out
                ``logps`` (and ``cu_seqlens``). Pathwise tensors as ever.
            bias: Of the head [V].
            temperature: Divides the logits, after the softcap.
            softcap: c in c tanh(logits / c).
            ignore_index: Target of rows that do not count.
            compact: Leave rows without weight out of the matrix products; waits for the device once.
            num_samples_in_window: See `combine`.
            loss_divisor: See `combine`.
            impl: "auto", "triton" or "reference"; see `barrierlm_kernels`.
            memory_budget: Bytes of logits that may exist at a time; None: the kernels' default.
            vocab_parallel: A `barrierlm_kernels.VocabParallel`: ``weight`` and ``bias`` are this rank's slice of the
                vocabulary, and the ranks of its group are replicas, which ``process_group`` must not hold.

        Returns:
            An `ObjectiveOutput`; call ``.loss.backward()``.

        Raises:
            TypeError, ValueError: As for `combine`; measurements, hidden states or a head that do not fit the
                batch; ``logps`` with gradient; nothing to differentiate while gradients are on.
            ValueError: ``multiplier="current"``, whose weights are known only after the pass.

        Example:
            >>> hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
            >>> batch = PackedBatch(
            ...     torch.tensor([4, 2, 1, 7, 1]), torch.tensor([0, 3, 5]), torch.tensor([1 / 3, 0.0]), num_sampled=1
            ... )
            >>> objective = BarrierObjective(None, [Constraint("length", upper=3.0)])
            >>> out = objective.linear(hidden, head, batch, {"length": Sampled.per_token(torch.ones(2))})
            >>> out.loss.backward()
            >>> objective.step()

        Source: ARCHITECTURE.md, "One pass over the head".
        """
        from .linear import Head, check_pass, one_pass  # loads the kernels, which nothing else here needs

        measurements, num_samples_in_window = measurements or {}, num_samples_in_window or {}
        if self.multiplier == "current":
            raise ValueError(
                "linear() with multiplier='current'; allowed: multiplier='committed' (its weights are known before the "
                "pass over the head; those of this call's own values only after it), or combine()"
            )
        self._check_call(measurements, num_samples_in_window, loss_divisor, how="linear")
        sampled = {name: m for name, m in measurements.items() if isinstance(m, Sampled)}
        weight = gathered(weight, mean=self.gradient_reduction == "mean")
        head = Head(weight, bias, temperature, softcap, ignore_index, impl, memory_budget, vocab_parallel)
        check_pass(hidden, head, batch, sampled)
        names, device = self._committed.bounds.names, hidden.device
        expected = {names.index(name): n for name, n in num_samples_in_window.items()}
        measured = self._measure({name: m for name, m in measurements.items() if name not in sampled})
        ours = {names.index(name): m for name, m in sampled.items()}
        view = self._committed.view(device)
        weights = {k: view.weights[k] * self._share(batch.num_sampled, expected.get(k), loss_divisor) for k in ours}
        out = one_pass(hidden, head, batch, ours, view, weights, compact=compact)
        terms = self._linear_terms(measured, expected, loss_divisor)
        rows = _rows(measured) | out.window_rows
        return self._finish(out.loss, terms, out.task_loss, view.penalty, rows, expected, separable=False)

    def measure(self, measurements: Measurements) -> None:
        """Take measurements into the open window without a loss: something else makes their gradient from `weights`.

        Args:
            measurements: As for `combine`; a `Sampled` leaves out ``logps``, a tensor needs no gradient. Where ranks
                share a window, each measures its own samples, or one of them everybody's.

        Raises:
            TypeError, ValueError: As for `combine`.

        Example:
            >>> objective = BarrierObjective(None, [Constraint("length", upper=3.0)])
            >>> for _ in range(2):
            ...     objective.measure({"length": Sampled(torch.tensor([4.0, 6.0]))})
            ...     objective.step()
            >>> objective.weights["length"] > 0
            True
        """
        with torch.inference_mode(False), torch.no_grad():  # later calls write into the window
            self._check_call(measurements, {}, 1, how="measure")
            measured = self._measure(measurements)
            self._take(_rows(measured), {})

    def step(self) -> None:
        """Commit the window: reduce its sums over the ranks, update the estimates, set the next multipliers.

        Call it once per optimizer step, on every rank, with or without samples. Everything is checked before
        anything changes; after an error the window is still there (`discard_window` forgets it). A window in
        which no rank has measured a sample changes nothing.

        Raises:
            RuntimeError: No call since the last step, on any rank; other constraints on another rank.
            FloatingPointError: NaN or infinite measurements, with ``nonfinite="raise"``.
            ValueError: A group of one response; a bound that `LogBarrier` finds infeasible.
        """
        calls, rows = self._window.reduce(self.process_group)
        if calls == 0:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "step() with nothing measured since the last one; allowed: after at least one call of the "
                    "objective (with gradients on) in the window"
                )
            return
        sums = numbers(rows)
        self._check_sums(sums)
        committed, expected = self._committed.commit(rows, sums, tick=True), self._window.expected
        self._window.clear()
        # Only now: one rank may be alone with a warning, which -W error makes an error.
        self._warn_of_counts(sums, expected)
        self._warn_of_unmeasured(sums)
        if not committed and not any(row[Column.NONFINITE] for row in sums):
            self._warn_once(
                "empty",
                "a window without a single sample: estimates, multipliers and schedule stay as they were.",
            )

    def calibrate(self, measurements: Measurements) -> None:
        """Measure before the first window, so that it already has scales and multipliers.

        Counts as one window for the estimates, not for the schedule. Gradients are neither needed nor used.

        Args:
            measurements: As for `combine`; on several ranks, called by all of them.

        Raises:
            FloatingPointError: NaN or infinite measurements, with ``nonfinite="raise"``.
            RuntimeError: Within an unfinished window.
            TypeError, ValueError: As for `combine`.
        """
        if self._window.calls:
            raise RuntimeError(
                f"calibrate() after {self._window.calls} call(s) of an unfinished window; allowed: before the first "
                "call, or after step() or discard_window()"
            )
        with torch.no_grad():
            self._check_call(measurements, {}, 1, how="calibrate")
            measured = self._measure(measurements)
        window = Window(len(self.constraints), self._window.mark)
        window.add(_rows(measured), {})
        _, rows = window.reduce(self.process_group)
        sums = numbers(rows)
        self._check_sums(sums)
        self._committed.commit(rows, sums, tick=False)
        self._unmeasured = [0] * len(self.constraints)

    def discard_window(self) -> None:
        """Forget the unfinished window, as after running out of memory or a skipped fp16 step."""
        self._window.clear()

    # ---- reading it ------------------------------------------------------------------------------------

    def report(self) -> Report:
        """One row per bound: estimate, standard error, bound, slack, multiplier, verdict; prints as a table.

        The verdict is ``met``, ``active`` (within two standard errors, or a hundredth of the scale),
        ``violated``, ``infeasible together with ...`` or ``unknown`` (not measured yet).
        """
        return self._committed.report

    def certificate(self, gradients: GradientProbe | None = None, *, level: float = 0.95) -> Certificate:
        """What may be claimed: multipliers, a bound on the gap to the optimum, how stationary the point is.

        Changes nothing. See `Certificate` for the math and its conditions.

        Args:
            gradients: A `GradientProbe` of at least two batches of the window that is open; None: without the
                stationarity. On several ranks, called by all of them.
            level: Of each interval, in (0, 1).

        Returns:
            A `Certificate`; it prints as a table and a plain sentence.

        Raises:
            TypeError: Something that is no `GradientProbe`.
            ValueError: ``level`` outside its range, fewer than two batches, or taken under other multipliers.
            RuntimeError: Nothing measured yet.
        """
        return certify(self._committed, gradients, level, self.process_group)

    def metrics(self) -> dict[str, float]:
        """The committed state as flat floats; named ``constraints/<name>/...``, ``barrier/...``.

        Numbers that are not known yet are NaN.
        """
        return self._committed.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: plain tensors and numbers, deep-copied.

        An unfinished window is not saved, as the gradients that belong to it are not either.
        """
        return self._committed.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; a resumed run equals one that never stopped, bit for bit.

        Args:
            state: From an objective with the same constraints, rule, schedule and estimator.

        Raises:
            ValueError: A state of other constraints or methods, or something else altogether. Nothing is
                changed then.
        """
        self._committed.load_state_dict(state)
        self._window.clear()
        self._unmeasured = [0] * len(self.constraints)

    # ---- inside ----------------------------------------------------------------------------------------

    def _combine(
        self,
        task_loss: Tensor | None,
        measurements: Measurements,
        num_samples_in_window: Mapping[str, int | Tensor],
        loss_divisor: float,
    ) -> ObjectiveOutput:
        if task_loss is None:
            device = next((_device(m) for m in measurements.values()), None)
            task_loss = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        if not isinstance(task_loss, Tensor) or not task_loss.is_floating_point() or task_loss.dim() != 0:
            given = tuple(task_loss.shape) if isinstance(task_loss, Tensor) else type(task_loss).__name__
            raise ValueError(f"task_loss is {given}; allowed: a 0-d floating torch.Tensor (take its mean or sum)")
        names = self._committed.bounds.names
        expected = {names.index(name): n for name, n in num_samples_in_window.items()}
        measured = self._measure(measurements)
        if self.multiplier == "current":
            terms, penalty = barrier_terms(self._committed, _apart(measured))
        else:
            terms = self._linear_terms(measured, expected, loss_divisor)
            penalty = self._committed.view(task_loss.device).penalty
        return self._finish(task_loss, terms, task_loss, penalty, _rows(measured), expected)

    def _finish(
        self,
        loss: Tensor,
        terms: list[Tensor],
        task_loss: Tensor,
        penalty: Tensor,
        rows: dict[tuple[int, ...], Tensor],
        expected: dict[int, int | Tensor],
        *,
        separable: bool = True,
    ) -> ObjectiveOutput:
        first, *others = [term.to(loss.device) for term in terms] or [torch.zeros_like(loss)]
        constraint_loss = sum(others, first)
        if torch.is_grad_enabled():
            self._take(rows, expected)
        share: float | Tensor = 1.0
        if self.normalize:
            share = self._committed.view(loss.device).normalizer.to(loss.dtype)
            loss, constraint_loss = loss * share, constraint_loss * share
        total = loss + constraint_loss
        bounds = Report(self._committed.report, self._committed.metrics)
        out = ObjectiveOutput(total, task_loss.detach(), penalty.to(loss.device), bounds)
        out._parts, out._share = (loss, constraint_loss) if separable else None, share
        return out

    def _take(self, rows: dict[tuple[int, ...], Tensor], expected: dict[int, int | Tensor]) -> None:
        self._window.add(rows, expected)
        if self.windows == 0 and self._window.calls == _CALLS_BEFORE_WARNING:
            self._warn_once(
                "step",
                f"{self._window.calls} calls without objective.step(): nothing is committed and the multipliers "
                "stay as they are. Call objective.step() after each optimizer step (if these are the micro-batches of "
                "one, all is well).",
            )

    def _check_call(self, measurements: Any, num_samples: Any, loss_divisor: Any, *, how: str = "combine") -> None:
        check_call(self._committed.bounds.names, measurements, num_samples, loss_divisor, how=how)
        if self.multiplier == "current" and world_size(self.process_group) > 1:
            raise RuntimeError(
                f"multiplier='current' with {world_size(self.process_group)} ranks; allowed: one process (the barrier "
                "of a rank's own mean has another gradient), or multiplier='committed'"
            )
        if self.multiplier == "current" and (num_samples or loss_divisor != 1):
            raise ValueError(
                "num_samples_in_window or loss_divisor with multiplier='current'; allowed: one call per window there, "
                "or multiplier='committed'"
            )

    def _measure(self, measurements: Measurements) -> _Stacks:
        names = self._committed.bounds.names
        given = {k: measurements[name] for k, name in enumerate(names) if measurements.get(name) is not None}
        measured = {}
        for stack in stacks(given, structure):
            view, index = self._committed.view(_device(next(iter(stack.values())))), tuple(stack)
            center, baselines = rows_of(view.center, index), rows_of(view.baselines, index)
            measured[index] = measure(list(stack.values()), center, baselines)
        return measured

    def _linear_terms(self, measured: _Stacks, expected: dict[int, int | Tensor], loss_divisor: float) -> list[Tensor]:
        """w_k times this micro-batch's share of the window's mean, added up by stack."""
        terms = []
        for index, m in measured.items():
            weights = rows_of(self._committed.view(m.total.device).weights, index)
            if expected.keys().isdisjoint(index):
                weights = weights * self._share(m.count, None, loss_divisor)
            else:
                shares = [self._share(m.count, expected.get(k), loss_divisor) for k in index]
                weights = torch.stack([w * share for w, share in zip(weights.unbind(), shares, strict=True)])
            terms.append((m.total * weights.to(m.total.dtype)).sum())
        return terms

    def _share(self, count: int, expected: int | Tensor | None, loss_divisor: float) -> float | Tensor:
        """What a sum over ``count`` samples is multiplied by, such that the loop's own division and averaging
        give the window's mean."""
        ranks = world_size(self.process_group)
        if expected is None:
            return 1 / max(count, 1) / (ranks if self.gradient_reduction == "sum" else 1)
        n = expected.clamp(min=1) if isinstance(expected, Tensor) else max(expected, 1)
        return loss_divisor * (ranks if self.gradient_reduction == "mean" else 1) / n

    def _check_sums(self, sums: list[list[float]]) -> None:
        check_sums(self._committed.bounds.names, sums, raise_nonfinite=self.nonfinite == "raise")

    def _warn_of_counts(self, sums: list[list[float]], expected: Mapping[int, int | Tensor]) -> None:
        names = self._committed.bounds.names
        for k, n in expected.items():
            found = int(sums[k][Column.COUNT])
            if found != int(n) and not sums[k][Column.NONFINITE]:
                self._warn_once(
                    "expected",
                    f"num_samples_in_window[{names[k]!r}]={int(n)}, but the window had {found} samples: the "
                    f"constraint's gradient was {found / max(int(n), 1):.3g} times the right one.",
                )

    def _warn_of_unmeasured(self, sums: list[list[float]]) -> None:
        for k, row in enumerate(sums):
            found = row[Column.COUNT] or row[Column.NONFINITE]
            self._unmeasured[k] = 0 if found else self._unmeasured[k] + 1
            if self._unmeasured[k] == _WINDOWS_BEFORE_WARNING:
                name = self._committed.bounds.names[k]
                self._warn_once(
                    f"unmeasured {name}",
                    f"{name!r} was not measured in the last {_WINDOWS_BEFORE_WARNING} windows: its estimate and its "
                    "verdict are still those of before.",
                )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            # The first line outside of this file.
            frame, level = sys._getframe(), 1
            while frame.f_back is not None and frame.f_code.co_filename == __file__:
                frame, level = frame.f_back, level + 1
            warnings.warn(message, RuntimeWarning, stacklevel=level)


def _device(measurement: Tensor | Sampled) -> torch.device:
    return measurement.device


def _rows(measured: _Stacks) -> dict[tuple[int, ...], Tensor]:
    """The stacks' rows of sums."""
    return {index: m.row for index, m in measured.items()}


def _apart(measured: _Stacks) -> dict[int, Measured]:
    """The same by constraint."""
    return {
        k: Measured(total, m.count, row)
        for index, m in measured.items()
        for k, total, row in zip(index, m.total.unbind(), m.row.unbind(), strict=True)
    }
