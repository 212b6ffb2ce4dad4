"""How many tokens the student should propose before the teacher looks: those that give the most tokens a second.

A block of g proposals emits E(g) = P(1) + ... + P(g) tokens, P(i) the share of blocks that emit at least i of them. A
step takes T(g) = a + b g seconds: b is a draft and one more position to verify, a all else. All of it is measured
while the engine works, a and b for each size of the batch. The law of the text does not depend on g.

A token counts as emitted where it stays in the response: with long blocks more goes to waste behind the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCKS_FORGOTTEN = 1 / 4000  # share of what is known of blocks that one more block takes away
UNKNOWN = 10  # blocks that what the place before says of a place is worth
STEPS_FORGOTTEN = 1 / 100
TRIED = 3  # steps for which each end is tried, where nothing is known of a size of batch
# Share of the best speed that a length may lack and be as good, if no proposal of the best would stay. The shortest of
# such is taken: a batch ends with the responses of which the least stays, and for those long blocks are of less use
# than for all. Where all proposals stay there are no such responses.
AS_GOOD = 0.05
AGAIN = 40  # steps after which a neighbour of the best is tried, for
AGAIN_FOR = 2  # steps: the first of them still verifies blocks of the old length


@dataclass
class StepCost:
    """Seconds of a step by the drafts of a request, of batches of about one size: a line through what was measured."""

    steps: int = 0  # that were asked for
    # Decayed sums of 1, g, g^2, T and g T.
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def observe(self, drafts: int, seconds: float) -> None:
        known = self.line()
        if known is not None:  # one step that the machine has held up is not to count for ten
            seconds = min(seconds, 3 * (known[0] + known[1] * drafts))
        new = (1.0, drafts, drafts**2, seconds, drafts * seconds)
        self.sums = [old * (1 - STEPS_FORGOTTEN) + one for old, one in zip(self.sums, new, strict=True)]

    def line(self) -> tuple[float, float] | None:
        """(a, b), neither below 0; None where all steps had the same number of drafts."""
        count, drafts, squares, seconds, products = self.sums
        spread = count * squares - drafts**2
        if spread <= 1e-6 * max(count, 1.0) ** 2:
            return None
        slope = max((count * products - drafts * seconds) / spread, 0.0)
        return max((seconds - slope * drafts) / count, 1e-9), slope


class DraftLength:
    def __init__(self, most: int) -> None:
        self._most = most
        self._costs: dict[int, StepCost] = defaultdict(StepCost)  # by the size of a batch, in powers of two
        # Decayed counts of blocks, by their place i: that had i proposals, and that emitted i tokens.
        self._had, self._emitted = [0.0] * (most + 1), [0.0] * (most + 1)

    def choose(self, requests: int) -> int:
        """For the next step of so many requests."""
        cost = self._costs[requests.bit_length()]
        asked, cost.steps = cost.steps, cost.steps + 1
        if asked < 2 * TRIED:
            return self._most if asked < TRIED else 1
        best = self._best(cost)
        turn, place = divmod(asked, AGAIN)
        if place >= AGAIN_FOR:
            return best
        return max(best - 1, 1) if turn % 2 else min(best + 1, self._most)

    def _best(self, cost: StepCost) -> int:
        line = cost.line()
        if line is None:
            return self._most
        tokens = self._expected_tokens()
        speeds = {drafts: tokens[drafts] / (line[0] + line[1] * drafts) for drafts in range(1, self._most + 1)}
        best = max(speeds, key=lambda drafts: speeds[drafts])
        as_good = speeds[best] * (1 - AS_GOOD * (1 - tokens[best] / best))
        return min(drafts for drafts, speed in speeds.items() if speed >= as_good)

    def _expected_tokens(self) -> list[float]:
        """E(g) by g."""
        tokens, share, kept = [0.0], 1.0, 1.0
        for place in range(1, self._most + 1):
            # Of a place of which little is known: as at the place before.
            known, likely = self._had[place], share * kept if place > 1 else 1.0
            measured = min((self._emitted[place] + UNKNOWN * likely) / (known + UNKNOWN), share)
            kept, share = measured / share if share else 0.0, measured
            tokens.append(tokens[-1] + share)
        return tokens

    def observe_blocks(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Args: blocks: of each its proposals, and its tokens that have stayed in the response."""
        left = (1 - BLOCKS_FORGOTTEN) ** len(blocks)  # of what is known of places that these blocks don't reach, too
        self._had = [count * left for count in self._had]
        self._emitted = [count * left for count in self._emitted]
        for proposals, emitted in blocks:
            for place in range(1, proposals + 1):
                self._had[place] += 1
                self._emitted[place] += place <= emitted

    def observe_step(self, requests: int, drafts: int, seconds: float) -> None:
        """Of a step that has verified and drafted the same number for each of its requests."""
        self._costs[requests.bit_length()].observe(drafts, seconds)
