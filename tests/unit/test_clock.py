"""The parts of a step's time add up to it."""

from __future__ import annotations

import pytest

from skd_plugin.core.clock import Clock


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
