"""Which samples make the next denoiser call.

Fewest calls left first: a request with one call never waits for the many calls of another, and the mean waiting time
is the least there is. Alone that would starve long requests while short ones keep coming, so every fourth call
belongs to whoever has waited longest for one. With n samples running each waits for at most 4 n calls, whatever comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from text2weight.sampling import Sample
from text2weight_service.ladder import Ladder, Shape
from text2weight_service.work_queue import WorkItem

FAIR_TURN = 4


@dataclass(eq=False)
class Running:
    """An item with its sample.

    Attributes:
        item: what is computed, and for whom.
        sample: how far it is.
        last_turn: number of the call that it last took part in, or before which it was admitted.
        taken: whether a call has it: nothing else may touch the sample.
        set_aside: whether it is to make its next call with others that were in one that failed.
        begun_at: `time.monotonic()` of its admission.
    """

    item: WorkItem
    sample: Sample
    last_turn: int
    taken: bool = False
    set_aside: bool = False
    begun_at: float = field(default_factory=time.monotonic)

    @property
    def shape(self) -> Shape:
        """What others must have in common with it to share a call."""
        return Shape(self.sample.condition.mask.shape[1], self.item.guided)


def choose_call(
    running: Sequence[Running],
    turn: int,
    ladder: Ladder,
    seconds: Callable[[Shape, int], float],
    lanes: int,
) -> tuple[list[Running], int]:
    """Choose the members of a denoiser call and its rows.

    Args:
        running: at least one.
        turn: number of the call.
        ladder: the sizes a call may have.
        seconds: expected time of a call by shape and rows.
        lanes: how many calls can be made at once now; each gets its share of those that could be its members.

    Returns:
        members, all of one shape, and the rows, at least as many.
    """
    if turn % FAIR_TURN == 0:
        order = sorted(running, key=lambda one: (one.last_turn, one.item.deadline))
    else:
        order = sorted(running, key=lambda one: (one.item.calls_left, one.item.deadline))
    shape = order[0].shape
    alike = [one for one in order if one.shape == shape]
    rows = ladder.choose(-(-len(alike) // lanes), lambda rung: seconds(shape, rung))
    return alike[:rows], rows
