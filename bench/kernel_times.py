"""Where a call's time goes: on a GPU by kernel, and for a training update by phase."""

import time
from collections.abc import Callable
from typing import Any

import torch

KERNELS = 12
"""The largest that a table shows."""


def shares(case: Callable[[], Any]) -> list[dict[str, Any]]:
    """Kernels of one call by their share of device time, the largest ones; of operations without a GPU."""
    cuda = torch.cuda.is_available()
    case()
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        case()
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent = {event.key: float(getattr(event, attribute)) for event in profile.key_averages()}
    total = sum(spent.values()) or 1.0
    largest = sorted(spent.items(), key=lambda pair: -pair[1])[:KERNELS]
    return [{"kernel": name[:90], "ms": us / 1e3, "share": us / total} for name, us in largest]


def phases(update: Callable[[], Any], backend: Any) -> list[dict[str, Any]]:
    """Seconds of one update in the backend's forward, backward and optimizer, and in everything else.

    Waits for the device around each, so the sum is a little more than an undisturbed update takes. The head's gradient
    is formed in forward and counts there.
    """
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = _now()
            result = function(*arguments, **options)
            spent[name] = spent.get(name, 0.0) + _now() - start
            return result

        return call

    names = {"forward": "forward", "backward": "backward", "step": "optimizer"}
    before = {attribute: getattr(backend, attribute) for attribute in names}
    for attribute, name in names.items():
        setattr(backend, attribute, timed(name, before[attribute]))
    start = _now()
    try:
        update()
    finally:
        for attribute, function in before.items():
            setattr(backend, attribute, function)
    whole = _now() - start
    spent["other"] = whole - sum(spent.values())
    return [{"phase": name, "s": seconds, "share": seconds / whole} for name, seconds in spent.items()]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
