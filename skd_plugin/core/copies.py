"""Copies between ordinary memory and a device. Nothing here makes either wait for the other, but `Arriving.read`."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor, which is in ordinary memory, on the device."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # a copy of memory that is not pinned waits


class Arriving:
    """A tensor on its way from a device to ordinary memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._event = None if tensor.device.type == "cpu" else _event_now(tensor.device)

    def read(self) -> torch.Tensor:
        """The tensor, when it is there. From then on it is in memory that is not pinned."""
        if self._event is not None:
            self._event.synchronize()
            self._event, self._tensor = None, self._tensor.clone()
        return self._tensor


def _event_now(device: torch.device) -> torch.Event:
    event = torch.Event(device)
    event.record()
    return event
