"""The parts of a step's time add up to it."""

from __future__ import annotations

import pytest
import torch

from skd_plugin.core.clock import Clock, GpuClock, clock_on


class Watch:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def clock(watch: Watch) -> Clock:
    return Clock(watch)


def test_an_inner_part_is_not_the_outer_ones(clock: Clock, watch: Watch) -> None:
    watch.time += 1
    with clock.part("sample"):
        watch.time += 2
        with clock.part("record"):
            watch.time += 4
        watch.time += 8
    watch.time += 16
    assert clock.lap() == {"rest": 17, "sample": 10, "record": 4}
    watch.time += 3
    assert clock.lap() == {"rest": 3}


def test_a_part_that_raises_has_ended(clock: Clock, watch: Watch) -> None:
    with pytest.raises(ValueError, match="wrong"), clock.part("draft"):
        watch.time += 1
        raise ValueError("wrong")
    watch.time += 1
    assert clock.lap() == {"rest": 1, "draft": 1}


def test_a_part_that_is_open_at_the_end_of_a_lap_goes_on(clock: Clock, watch: Watch) -> None:
    clock.begin("queue")
    watch.time += 2
    assert clock.lap() == {"rest": 0, "queue": 2}
    watch.time += 3
    clock.end()
    assert clock.lap() == {"queue": 3, "rest": 0}


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ({"forward": 2.0, "backward": 3.0}, {"forward": 2.0, "backward": 3.0, "train": 5.0}),
        ({"forward": 12.0, "backward": 8.0}, {"forward": 6.0, "backward": 4.0, "train": 0.0}),  # two at once
        ({}, {"train": 10.0}),
    ],
)
def test_what_another_process_measured_is_taken_out_of_the_wait_for_it(
    clock: Clock, watch: Watch, inner: dict[str, float], expected: dict[str, float]
) -> None:
    with clock.part("train"):
        watch.time += 10
    clock.split("train", inner)
    lap = clock.lap()
    assert lap.pop("rest") == 0 and lap == expected


class Gpu:
    """Does what it is given in its order, while Python goes on; times in milliseconds."""

    def __init__(self) -> None:
        self.now = self.free = 0.0  # of Python; and when the GPU has done all that it was given

    def start(self, kernel: float) -> None:
        """Which Python needs 1 ms for."""
        self.now += 1
        self.free = max(self.now, self.free) + kernel

    def wait(self) -> None:
        self.now = max(self.now, self.free)

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._time = gpu, max(gpu.now, gpu.free)

    def synchronize(self) -> None:
        self._gpu.now = max(self._gpu.now, self._time)

    def elapsed_time(self, end: Event) -> float:
        return end._time - self._time


def test_on_a_gpu_kernels_count_where_they_were_started() -> None:
    """Two blocks of an engine: 20 ms of a forward, 2 of the sampler, which waits, 4 of drafts; then Python plans for
    3 ms, which the second time the drafts hide.
    """
    gpu, clocks = Gpu(), []
    for make in (lambda: GpuClock(gpu.event), lambda: Clock(lambda: gpu.now / 1000)):
        clock = make()
        for _ in range(2):
            with clock.part("verify"):
                gpu.start(20)
            with clock.part("schedule"):
                with clock.part("sample"):
                    gpu.start(2)
                    gpu.wait()
                with clock.part("draft"):
                    gpu.start(4)
            gpu.now += 3
        began = gpu.now
        clocks.append(clock.lap())
        assert gpu.now >= began, "the lap did not wait"
        gpu.now = gpu.free = max(gpu.now, gpu.free)
    on_gpu, in_python = clocks
    assert on_gpu == pytest.approx({"rest": 0.0, "verify": 0.041, "schedule": 0.0, "sample": 0.004, "draft": 0.01})
    assert in_python["sample"] > 0.04, "else this clock would do"


def test_a_lap_of_a_gpu_adds_up() -> None:
    gpu = Gpu()
    clock = GpuClock(gpu.event)
    for kernels in ([3, 0], [0, 7]):
        start = max(gpu.now, gpu.free)
        with clock.part("forward"):
            gpu.start(kernels[0])
        gpu.now += 2
        with clock.part("backward"):
            gpu.start(kernels[1])
        seconds = clock.lap()
        assert sum(seconds.values()) == pytest.approx((gpu.now - start) / 1000)
        assert gpu.now == gpu.free or gpu.now > gpu.free
    assert clock.lap() == {"rest": 0.0}
    with pytest.raises(NotImplementedError):
        clock.split("forward", {})


def test_the_clock_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from skd_plugin.core import clock

    monkeypatch.setattr(clock, "_event_now", Gpu().event)
    assert type(clock_on(torch.device("cpu"))) is Clock
    assert type(clock_on(torch.device("cuda"))) is GpuClock
