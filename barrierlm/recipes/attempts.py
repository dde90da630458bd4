"""Calls of cost functions that may raise or hang: timeout, retries, and then stop or go on without."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from .options import CostOptions

_log = logging.getLogger("barrierlm")

#: Calls that hang and were given up, still running, after which the run stops whatever the policy.
_MOST_ABANDONED = 8


class CostError(RuntimeError):
    """A cost function failed, and the policy is to stop."""


class Attempts:
    """Calls a function as often as the options allow.

    A call that takes longer than the timeout is given up, not ended: Python cannot end a thread. It goes on in the
    background, and where more than a few do, the run stops.

    Args:
        name: Of the cost, for messages.
        options: Timeout, retries and policy.
    """

    def __init__(self, name: str, options: CostOptions) -> None:
        self.name, self.options = name, options
        self._abandoned: list[threading.Thread] = []

    def __call__(self, action: Callable[[], Any]) -> Any:
        """What ``action`` returns; None where it failed and the policy is to go on without.

        Raises:
            CostError: It failed, and the policy is to stop.
        """
        for attempt in range(self.options.retries + 1):
            if attempt:
                time.sleep(self.options.retry_delay * 2 ** (attempt - 1))
            try:
                return self._once(action)
            except CostError:
                raise
            except (Exception, SystemExit) as error:  # a cost has no business to end the run without a word
                failure = error
                what = f"{type(error).__name__}: {error}"
                _log.warning("cost %s failed, attempt %d of %d: %s", self.name, attempt + 1, self._most, what)
        if self.options.on_error == "stop":
            raise CostError(
                f"cost {self.name} failed {self._most} time(s), the last with {type(failure).__name__}: {failure}; "
                "costs.retries tries more often, costs.on_error=skip goes on without it"
            ) from failure
        return None

    @property
    def _most(self) -> int:
        return self.options.retries + 1

    def _once(self, action: Callable[[], Any]) -> Any:
        if self.options.timeout is None:
            return action()
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) >= _MOST_ABANDONED:
            raise CostError(
                f"cost {self.name}: {len(self._abandoned)} calls hang (costs.timeout={self.options.timeout:g}); the "
                "run stops whatever costs.on_error says, or they would take the machine"
            )
        outcome: list[tuple[Any, BaseException | None]] = []
        # Both belong to the thread.
        grad, device = torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                with torch.set_grad_enabled(grad):
                    outcome.append((action(), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=work, daemon=True, name=f"cost {self.name}")  # must not hold up the exit
        began = time.monotonic()
        thread.start()
        thread.join(self.options.timeout)
        if not outcome:
            self._abandoned.append(thread)
        # A function that never lets another thread run (one long regular expression) answers, but late.
        if not outcome or time.monotonic() - began > 2 * self.options.timeout:
            raise TimeoutError(f"no answer within costs.timeout={self.options.timeout:g} s")
        value, failure = outcome[0]
        if failure is not None:
            raise failure
        return value
