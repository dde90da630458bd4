"""Checkpoints: everything the next step depends on, in one file that is whole or not there."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from barrierlm import BarrierObjective
from barrierlm.files import StorageError, damage, make_folder, replacing, storage_errors, sync_folder

from .best import BestWeights
from .config import ConfigError, leaves
from .options import Options
from .random_state import random_state, set_random_state

_KEEP = 2
_FORMAT = "barrierlm checkpoint 1"
_KEYS = {"format", "step", "run", "weights", "optimizer", "objective", "best", "random"}


class Checkpoints:
    """Files ``step-000020.pt`` with the trained weights (and the best ones), optimizer, objective and random states.

    The data position needs no saving: `DataOrder` is a function of the step, and ``run`` holds what the data was.

    Args:
        folder: Where they are; the newest two are kept.
        accelerator: Of the run; every process calls `save` and `load`, the main one writes.
        weights: The trained parameters.
        optimizer: Their optimizer.
        objective: Or None.
        best: Or None.
        run: What a resumed run must agree in, by name: `same_run`.
        say: Is told what the user should know.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Any,
        weights: Sequence[nn.Parameter],
        optimizer: Any,
        objective: BarrierObjective | None,
        best: BestWeights | None = None,
        *,
        run: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.weights, self.optimizer, self.objective, self.best = weights, optimizer, objective, best
        self.run, self.say = dict(run or {}), say

    def save(self, step: int) -> None:
        """Save after ``step`` optimizer steps; older ones go when this one is on the disk.

        Raises:
            StorageError: It cannot be written, on all processes; older ones are as they were.
        """
        randoms = gather_object([random_state()])
        self._on_main(lambda: self._save(step, randoms))

    def _save(self, step: int, randoms: list[dict[str, Any]]) -> None:
        state = {
            "format": _FORMAT,
            "step": step,
            "run": self.run,
            "weights": [p.detach().cpu() for p in self.weights],
            "optimizer": self.optimizer.state_dict(),
            "objective": None if self.objective is None else self.objective.state_dict(),
            "best": None if self.best is None else self.best.state_dict(),
            "random": randoms,
        }
        try:
            make_folder(self.folder)
            with replacing(self._path(step)) as file:
                try:
                    torch.save(state, file)
                except RuntimeError as error:  # what torch makes of a failing write
                    raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            self._remove_older()
        except StorageError as error:
            whole = [self._path(other).name for other in self._steps() if other <= step]
            left = f"; {whole[-1]} is whole: make room and continue with resume=true" if whole else ""
            raise StorageError(f"{error}{left}") from error

    def _remove_older(self) -> None:
        with storage_errors(self.folder):
            older = self._steps()[:-_KEEP]
            for old in older:
                self._path(old).unlink()
            if older:
                sync_folder(self.folder)

    def refuse_older(self) -> None:
        """A new run must not mix its checkpoints with those of an earlier one.

        Raises:
            ConfigError: There are some.
        """
        if self._on_main(self._steps):
            raise ConfigError(
                f"{self.folder} holds checkpoints of an earlier run; allowed: resume=true (--resume) to continue it, "
                "or another output_dir"
            )

    def load(self) -> int:
        """Restore the newest checkpoint that is whole, and say so where that is not the newest.

        Returns:
            The number of optimizer steps that it had taken.

        Raises:
            ConfigError: There is none, or it is of another run; on all processes, wherever it was found.
        """
        step = self._on_main(self._newest_whole)
        path = self._path(step)
        failure: ConfigError | None = None
        try:
            self._restore(path, step)
        except ConfigError as error:
            failure = error
        except Exception as error:  # an edited file may break any part; another node may not see the file at all
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            failure = ConfigError(f"{path} does not fit this run: {what}")
        failures = [error for error in gather_object([failure]) if error is not None]
        if failures:
            raise failures[0]
        self._on_main(self._remove_older)  # a run killed before it got to it, perhaps after its last step
        return step

    def _restore(self, path: Path, step: int) -> None:
        state = _read(path)
        if state["step"] != step:
            raise ConfigError(f"{path} is of step {state['step']}; allowed: its own name")
        # An option that there was not yet, when the file was written: as if not given.
        later = {key: value for key, _, value in leaves(Options()) if key in self.run}
        saved, own = later | state["run"], self.run
        for name in [*own, *saved]:
            if name not in saved or name not in own or saved[name] != own[name]:
                raise ConfigError(
                    f"{path} was made with {name}={saved.get(name)!r}, this run has {own.get(name)!r}; allowed: the "
                    "same, or another output_dir (docs/recipe.md lists what may differ)"
                )
        shapes, given = [p.shape for p in state["weights"]], [p.shape for p in self.weights]
        absent = [state[name] is None for name in ("objective", "best")]
        if shapes != given or absent != [self.objective is None, self.best is None]:
            raise ConfigError(f"{path} is of another model or of other constraints; allowed: the same options")
        self._check_optimizer(state["optimizer"])
        if self.objective is not None:
            self.objective.load_state_dict(state["objective"])
        if self.best is not None:
            self.best.load_state_dict(state["best"])
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, value in zip(self.weights, state["weights"], strict=True):
                p.copy_(value)
        set_random_state(state["random"][self.accelerator.process_index])

    def _check_optimizer(self, state: Any) -> None:
        """torch takes whatever has the right number of weights, and fails in the next step."""
        own = [{**group, "lr": None} for group in self.optimizer.state_dict()["param_groups"]]
        given = state["param_groups"]
        # Another version of torch may know fewer or more settings.
        saved = [{**own[0], **{name: group[name] for name in own[0] if name in group}, "lr": None} for group in given]
        rates = [group["lr"] for group in given]
        if repr(saved) != repr(own) or not all(isinstance(lr, float) and math.isfinite(lr) for lr in rates):
            raise ValueError("the optimizer's settings are others; allowed: those of this run")
        for index, moments in state["state"].items():
            shape = self.weights[index].shape
            for name, value in moments.items():
                expected = torch.Size() if name == "step" else shape
                if not isinstance(value, torch.Tensor) or value.shape != expected or not bool(value.isfinite().all()):
                    raise ValueError(f"the optimizer's {name} does not fit; allowed: finite, {tuple(expected)}")

    def _newest_whole(self) -> int:
        """Its step. What is damaged is set aside: it must neither count as a checkpoint nor be lost."""
        steps, damaged = self._steps(), []
        for step in reversed(steps):
            path = self._path(step)
            try:
                _read(path)
            except _Damaged as error:
                damaged.append(f"{path}: {error}")
                continue
            with storage_errors(self.folder):
                for other in (s for s in steps if s > step):
                    self._path(other).rename(self._path(other).with_suffix(".damaged"))
            for line in damaged:
                self.say(f"Warning: damaged checkpoint set aside as *.damaged, going back to step {step}. {line}")
            return step
        if damaged:
            raise ConfigError(
                "resume=true: no checkpoint can be read; allowed: a copy of one of them put in its place, or another "
                f"output_dir for a new run ({'; '.join(damaged)})"
            )
        raise ConfigError(
            f"resume=true: no checkpoint in {self.folder}; allowed: after a run with checkpoint_every > 0"
        )

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """What the main process's ``action`` returns or raises, on every process: none is left waiting for another."""
        outcome: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome = [action(), None]
            except Exception as error:
                outcome = [None, error]
        result, failure = broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        return result

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.pt"

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d{6,})\.pt", path.name) for path in self.folder.glob("step-*.pt"))
        return sorted(int(match[1]) for match in found if match)


class _Damaged(Exception):
    """A file that is no whole checkpoint."""


def _read(path: Path) -> dict[str, Any]:
    """The checkpoint, after its checksums; plain tensors and values, no code."""
    try:
        if (what := damage(path)) is not None:
            raise _Damaged(what)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Damaged(f"not written by this recipe ({str(error).splitlines()[0]})") from None
    except _Damaged:
        raise
    except (MemoryError, PermissionError) as error:  # says nothing about the file
        raise ConfigError(
            f"{path} cannot be read now ({type(error).__name__}: {error}); it was left as it is"
        ) from error
    except Exception as error:  # one flipped bit turns plain records into compressed ones: zlib.error, and others
        raise _Damaged(f"not a whole file ({error})") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT or not state.keys() >= _KEYS:
        raise _Damaged("not a checkpoint of this recipe and version")
    return state
