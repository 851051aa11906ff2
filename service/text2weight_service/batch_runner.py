"""The model's thread between denoiser calls: who joins, who leaves, and what happens when a call fails.

Calls are made on lanes, and the thread goes on while they compute. A call can fail; the runner cannot. A failed call
has moved no sample, so it is made again without the one that broke it.
Letters: K classes, D embedding size, P numbers in one head.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import structlog
import torch
from torch import Tensor

from text2weight.artifact import HeadArtifact
from text2weight.descriptions import ConditionText
from text2weight.errors import InvalidInputError
from text2weight.generator import GenerationRequest
from text2weight.sampling import Sample
from text2weight_service.call_watch import CallWatch
from text2weight_service.ladder import CALLS_TO_RECOVER, Ladder, Shape, StepTimes, is_out_of_memory
from text2weight_service.lanes import Lanes
from text2weight_service.metrics import Metrics
from text2weight_service.model import Model
from text2weight_service.schedule import Running, choose_call
from text2weight_service.text_stage import GenerationFailedError, fail_item
from text2weight_service.work_queue import DeadlineError, Generated, Progress, StoppedError, WorkItem, resolve_all

__all__ = ["BatchRunner", "GenerationFailedError", "SelfCheckError"]

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

_WARM_UP_CLASSES = ("cat", "dog")
_WARM_UP_S = 2.0
# Requests rarely name more, and calls for all of 256 would take seconds of the start.
_MANY_CLASSES = 32
# Repeated sizes give equal bits, but a device may choose its kernels anew.
_SELF_CHECK_TOLERANCE = 1e-2


class SelfCheckError(Exception):
    """The device computes something else than it did at start."""


@dataclass
class _Tally:
    """Of a call's members, and of the parts that it was made again in: how many there are, and failed for good."""

    members: int
    failed: int = 0


@dataclass(frozen=True)
class _Call:
    """A denoiser call under way; its seconds or its error come in `ended`.

    Attributes:
        members: the running items that it moves on.
        rows: its size.
        tally: of the members, and of those of the call that it is a part of.
        beside: whether another call may have been made at the same time.
        ended: done when it is over.
    """

    members: Sequence[Running]
    rows: int
    tally: _Tally
    beside: bool
    ended: Future[float]


class BatchRunner:
    """Moves running items on, some in each denoiser call, and resolves each item's future exactly once."""

    def __init__(
        self, model: Model, metrics: Metrics, most_rows: int, on_call_end: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare to run a model.

        Args:
            model: what is run.
            metrics: where to count.
            most_rows: the largest size of a call.
            on_call_end: called after each call, on another thread.
        """
        self.running: list[Running] = []
        self.ladder = Ladder(most_rows)
        self.times = StepTimes(model.config.head.hidden_dim + 1)
        self.stop = False
        self.watch = CallWatch()
        self._model = model
        self._metrics = metrics
        self._turn = 0
        self._lanes = Lanes(model.calls_at_once, self.watch, on_call_end)
        self._alone_for = 0  # so many more calls are made one at a time, after memory did not suffice for two
        self._calls: list[_Call] = []
        self._again: deque[tuple[Sequence[Running], _Tally]] = deque()  # parts of calls that failed
        self._request: GenerationRequest | None = None
        self._expected: Tensor | None = None
        metrics.ladder_rows.set(self.ladder.most)

    def warm_up(self) -> None:
        """Run every stage, so that the first request does not pay for lazy initialisation, and time the denoiser.

        Whatever the model raises passes through.
        """
        self.check()
        self._make_room()
        started_at = time.monotonic()
        for turn in range(2):
            for rows in self.ladder.rungs:
                if time.monotonic() - started_at > _WARM_UP_S:
                    return
                assert self._request is not None
                sample = self._model.begin(self._request)
                spent = self._submit([sample], rows).result()
                if turn > 0:  # the first call of a shape may allocate, choose kernels or record
                    self.times.add(Shape(sample.condition.mask.shape[1], guided=False), rows, spent)

    def _make_room(self) -> None:
        """Make the largest of the usual calls on all lanes, so that their memory is taken now and not at a busy moment.

        Allocators and mathematics libraries keep what their largest call took. Where there is not enough memory,
        smaller calls are made from the start.
        """
        assert self._request is not None
        times = -(-_MANY_CLASSES // len(self._request.classes))
        embeddings = self._request.embeddings.repeat(times, 1)  # (K, D)
        text = ConditionText(embeddings, "warm-up")
        classes = self._request.classes * times
        request = replace(self._request, classes=classes, embeddings=embeddings, condition_text=text)
        while True:
            rows = self.ladder.most
            samples = [self._model.begin(request) for _ in range(self._lanes.count)]
            calls = [self._submit([sample], rows) for sample in samples]
            errors = [error for error in (call.exception() for call in calls) if error is not None]
            if not errors:
                return
            if rows == 1 or not is_out_of_memory(errors[0]):
                raise errors[0]
            self._shrink(rows)

    def check(self) -> None:
        """Prove that the device still computes, and what it did at start; tells a broken model from a broken request.

        Raises:
            SelfCheckError: the numbers are others than at start.
            Exception: whatever the model raises.
        """
        self._settle()
        self._request = self._check_request()
        with self.watch:
            sample = self._model.begin(self._request)
        while not sample.done:
            spent = self._submit([sample], 1).result()
            if self._expected is not None:  # the first calls of all may allocate, choose kernels or record
                self.times.add(Shape(sample.condition.mask.shape[1], guided=False), 1, spent)
        with self.watch:
            artifact = self._model.finish(sample)
        artifact.to_bytes()
        numbers = torch.cat([artifact.tensors[name].flatten() for name in sorted(artifact.tensors)])  # (P,)
        if self._expected is None:
            self._expected = numbers
        tolerance = _SELF_CHECK_TOLERANCE * float(self._expected.abs().max())
        if not torch.allclose(numbers, self._expected, rtol=0, atol=tolerance):  # not finite is not close
            raise SelfCheckError("the self-check's head is not the one that the device computed at start")

    @property
    def lanes(self) -> int:
        """How many calls are made at once."""
        return self._lanes.count

    @property
    def _at_once(self) -> int:
        return 1 if self._alone_for else self._lanes.count

    @property
    def can_go_on(self) -> bool:
        """Whether `turn` has something to do without new items."""
        if any(call.ended.done() for call in self._calls):
            return True
        return not self.full and any(not one.taken for one in self.running)

    @property
    def full(self) -> bool:
        """Whether new items can only wait for a call to end."""
        return len(self._calls) >= self._at_once

    def wait(self) -> None:
        """Wait until a call has ended, where one is under way."""
        wait([call.ended for call in self._calls], return_when=FIRST_COMPLETED)

    def turn(self, items: Sequence[WorkItem]) -> bool:
        """Take calls back that have ended, finish what is done, begin items, and make as many calls as can be made.

        Calls come first, so that they compute while the rest is done: an item may miss the first that is made after it
        came. Who has left or is late takes part in none.

        Returns:
            False when the model failed on all of a call's members, on all items to begin or on all to finish, for a
            reason that is not a request's own input.
        """
        fine = self._take_back()
        self._drop_unwanted()
        self._make_calls()
        fine = self._leave() and fine
        fine = self._begin(items) and fine
        self._make_calls()
        return self._leave() and fine  # what needs no call at all is done as soon as it is begun

    def fail_all(self, error: Exception) -> None:
        """Resolve all running items with an error."""
        resolve_all((one.item, error) for one in self.running)
        self.running.clear()
        self._calls.clear()
        self._again.clear()

    def close(self) -> None:
        """Return when no call is under way any more; none can be made after this."""
        self._lanes.close()

    def _begin(self, items: Sequence[WorkItem]) -> bool:
        claimed = [item for item in items if item.start()]
        failures = 0
        for item in claimed:
            try:
                sample = self._with_memory(partial(self._model.begin, item.work.fill_in(item.known)))
            except Exception as error:  # the model may raise anything, and the thread must survive it
                failures += fail_item(item, error)
                continue
            item.calls_left = len(sample.plan)
            one = Running(item, sample, self._turn)
            self._metrics.queue_seconds.observe(one.begun_at - item.queued_at - item.encode_s)
            self.running.append(one)
        return not claimed or failures < len(claimed)

    def _make_calls(self) -> None:
        """Make calls until all lanes are busy or nothing waits for one."""
        while not self.full:
            chosen = self._part_again() or self._choose()
            if chosen is None:
                return
            members, rows, tally = chosen
            for one in members:
                one.taken, one.set_aside, one.last_turn = True, False, self._turn
            ended = self._submit([one.sample for one in members], rows)
            self._calls.append(_Call(members, rows, tally, self._at_once > 1, ended))

    def _submit(self, samples: Sequence[Sample], rows: int) -> Future[float]:
        """Make a call on a lane; its seconds or its error come in the future."""
        return self._lanes.submit(partial(self._model.advance, samples, rows))

    def _part_again(self) -> tuple[Sequence[Running], int, _Tally] | None:
        """A part of a call that failed, without those that were dropped in the meantime."""
        while self._again:
            part, tally = self._again.popleft()
            if members := [one for one in part if one in self.running]:
                return members, self.ladder.at_least(len(members)), tally
        return None

    def _choose(self) -> tuple[Sequence[Running], int, _Tally] | None:
        waiting = [one for one in self.running if not (one.taken or one.set_aside or one.sample.done)]
        if not waiting:
            return None
        self._turn += 1
        free = self._at_once - len(self._calls)
        members, rows = choose_call(waiting, self._turn, self.ladder, self.times.seconds, free)
        return members, rows, _Tally(len(members))

    def _take_back(self) -> bool:
        """Take in what has become of the calls that ended; returns False when the model failed on all of one."""
        fine = True
        for call in [call for call in self._calls if call.ended.done()]:
            self._calls.remove(call)
            for one in call.members:
                one.taken = False
            error = call.ended.exception()
            if error is None:
                call.tally.failed += self._moved(call.members, call.rows, call.ended.result())
            elif isinstance(error, Exception):
                call.tally.failed += self._recover(call, error)
            else:
                raise error
            fine = fine and call.tally.failed < call.tally.members
        return fine

    def _moved(self, members: Sequence[Running], rows: int, spent: float) -> int:
        """Count a call that succeeded and tell who watches; returns how many the model failed on."""
        self.times.add(members[0].shape, rows, spent)
        self._metrics.stage_seconds.labels("sample").observe(spent)
        self._metrics.batch_size.observe(len(members))
        self._metrics.padding_rows.inc(rows - len(members))
        self.ladder.succeeded()
        self._alone_for = max(self._alone_for - 1, 0)
        self._metrics.ladder_rows.set(self.ladder.most)
        for one in members:
            one.item.calls_left = len(one.sample.plan) - one.sample.calls
        return sum(self._report(one) for one in members)

    def _recover(self, call: _Call, error: Exception) -> int:
        """Have the members of a call that failed make smaller ones; returns how many the model failed on for good."""
        self._metrics.batch_failures.inc()
        members = call.members
        if is_out_of_memory(error) and (call.rows > 1 or call.beside):
            if call.rows > 1:
                self._shrink(call.rows)
            else:
                self._alone_for = CALLS_TO_RECOVER
                log.warning("out of memory, making one call at a time")
            return 0  # no sample has moved: they are members of later calls
        if len(members) == 1:
            return self._fail(members[0], error)
        log.warning("denoiser call failed, halving it", members=len(members), error=repr(error))
        half = len(members) // 2
        for one in members:
            one.set_aside = True
        self._again += [(members[:half], call.tally), (members[half:], call.tally)]
        return 0

    def _settle(self) -> None:
        """Wait until no call is under way. What has become of them is taken in later."""
        wait([call.ended for call in self._calls])

    def _shrink(self, rows: int) -> None:
        """A call of so many rows was too large for the memory: make smaller ones, and give back what is cached."""
        self.ladder.shrink(rows)
        self._metrics.ladder_rows.set(self.ladder.most)
        log.warning("out of memory, making smaller calls", rows=rows, largest=self.ladder.most)
        _give_memory_back()

    def _with_memory(self, call: Callable[[], Result]) -> Result:
        """Make a call for one item; where memory runs out, give back what is cached and make it once more.

        Only if that helps are calls too large; else it is the item that is.
        """
        try:
            with self.watch:
                return call()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._settle()  # a call under way may have the memory
        _give_memory_back()
        with self.watch:
            result = call()
        self._shrink(self.ladder.most)
        return result

    def _report(self, one: Running) -> int:
        """Tell whoever watches about the last call; returns 1 if that failed through the model's fault."""
        item, sample = one.item, one.sample
        if item.report is None:
            return 0
        head = None
        try:
            if item.heads_every and sample.calls % item.heads_every == 0:
                head = self._with_memory(partial(self._model.preview, sample)).to_bytes()
        except Exception as error:
            return self._fail(one, error)
        item.report(Progress(sample.calls, len(sample.plan), sample.plan[sample.calls - 1].timestep, head))
        return 0

    def _leave(self) -> bool:
        """Finish the items that are done; returns False when there are some and the model failed on all of them."""
        done = [one for one in self.running if not one.taken and one.sample.done]
        results = []
        failed = 0
        for one in done:
            try:
                artifact = self._with_memory(partial(self._model.finish, one.sample))
                results.append((one.item, self._result(one, artifact)))
            except Exception as error:
                failed += self._fail(one, error)
                continue
            self.running.remove(one)
        resolve_all(results)
        self._metrics.heads.inc(len(results))
        return not done or failed < len(done)

    def _result(self, one: Running, artifact: HeadArtifact) -> Generated:
        item = one.item
        return Generated(
            data=artifact.to_bytes(),
            key=item.work.key,
            queue_s=max(one.begun_at - item.queued_at - item.encode_s, 0.0),
            encode_s=item.encode_s,
            sample_s=time.monotonic() - one.begun_at,
        )

    def _fail(self, one: Running, error: Exception) -> int:
        self.running.remove(one)
        return int(fail_item(one.item, error))

    def _drop_unwanted(self) -> None:
        if self.stop:
            self.fail_all(StoppedError())
        now = time.monotonic()
        free = [one for one in self.running if not one.taken]
        unwanted = [one for one in free if one.item.abandoned or now >= one.item.deadline]
        for one in unwanted:
            self.running.remove(one)
            self._metrics.dropped.labels("left" if one.item.abandoned else "deadline").inc()
        resolve_all((one.item, DeadlineError()) for one in unwanted if not one.item.abandoned)

    def _check_request(self) -> GenerationRequest:
        """Two classes by the default sampler, always the same."""
        sampler, steps = self._model.resolve_sampling(None, None)
        encoder = self._model.text_encoder
        # Of names that training never saw a head may follow the denoiser only in part, and hide its faults.
        classes = self._model.config.classes[:2] or _WARM_UP_CLASSES
        try:
            with self.watch:
                embeddings = encoder.encode(self._model.prompts(classes))  # (K, D)
        except InvalidInputError:  # a table of embeddings need not hold these names
            embeddings = torch.eye(len(classes), encoder.embedding_dim)  # (K, D)
        text = ConditionText(embeddings, "warm-up")  # nor need a checkpoint's own condition texts
        return GenerationRequest(classes, embeddings, 0, steps, sampler, condition_text=text)


def _give_memory_back() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
