"""Scheduler: which requests compute how many tokens in the next step."""

from __future__ import annotations

import time
from collections import deque

from cachedattn._core import StoreError
from cachedattn.batch import Work
from cachedattn.prefill_times import PrefillTimes
from cachedattn.request import Request, RequestState
from cachedattn.store import NO_LIMIT, UNKNOWN_COST, AttentionStore


class Scheduler:
    """Continuous batching with chunked prefill, first come, first served.

    Running requests come first, so an answer never waits for a prompt; prompts share what is
    left of `max_step_tokens`. When the pool is full the latest request gives its place back and
    waits again; its finished blocks are history by then. A request whose history is not there yet
    joins when its own computing can hide the rest of the loading, or when nothing else runs.
    """

    def __init__(
        self, store: AttentionStore, *, max_num_seqs: int, max_step_tokens: int, reuse: bool
    ) -> None:
        self.store = store
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.max_history = NO_LIMIT if reuse else 0
        self.always_load = store.config.load == "always"
        self.prefill = PrefillTimes(max_step_tokens)
        self.others_first = True  # False: a turn whose history is on its way joins at once
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._queue_changed = False

    def add(self, request: Request) -> None:
        """Queues a request. ValueError: its window holds nothing that a cut could drop."""
        self._make_chain(request)
        self.waiting.append(request)

    def schedule(self) -> list[Work]:
        """The next step's work, with slots reserved; empty when nothing waits or runs."""
        self._publish_queue()
        budget = self.max_step_tokens
        work: list[Work] = []
        loading: list[Request] = []
        started = list(self.running)
        for request in started:
            if request.state is RequestState.RUNNING and budget > 0:
                if self._loads_first(request):
                    loading.append(request)
                    continue
                num_tokens = self._reserve_or_preempt(request, budget)
                budget -= num_tokens
                work += [(request, num_tokens)] if num_tokens else []
        loading = [request for request in loading if request.state is RequestState.RUNNING]
        # If the pool is full a newcomer would only be preempted again.
        if len(self.running) == len(started):
            self._start_waiting(work, loading, budget)
        if not work:  # nothing to compute meanwhile
            for request in loading[:1]:
                work.append((request, self._reserve_or_preempt(request, budget)))
        for request, _ in work:
            if not request.started:
                request.note_start()
        self._publish_queue()  # what has begun does not wait any more
        return work

    def retry(self, request: Request) -> None:
        """Sends a running request back to the head of the queue; its step is dropped."""
        assert request.sequence is not None
        request.note_stop()
        request.sequence.close()
        request.sequence = None
        request.state = RequestState.WAITING
        self.running.remove(request)
        self._make_chain(request)
        self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """Forgets a request that ends."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
            self._queue_changed = True

    def _start_waiting(self, work: list[Work], loading: list[Request], budget: int) -> None:
        """Begins requests while there is room; adds them to `work`, or to `loading`."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            num_tokens = self._start(self.waiting[0], budget, wait=not self.running)
            if not num_tokens:
                return
            request = self.running[-1]
            if self._loads_first(request):
                loading.append(request)
            else:
                budget -= num_tokens
                work.append((request, num_tokens))

    def _loads_first(self, request: Request) -> bool:
        """Whether others should compute while its history is loaded: more time is left of that
        than its own computing would hide (CachedAttention, section 3.2.1: the read buffer)."""
        if not self.others_first or request.started or not request.sequence.loading:
            return False
        compute_s = self.prefill.seconds(request.num_remaining, request.sequence.context_len)
        return request.sequence.load_left_s > compute_s

    def _publish_queue(self) -> None:
        if self._queue_changed:
            self.store.set_queue([request.chain for request in self.waiting])
            self._queue_changed = False

    def _make_chain(self, request: Request) -> None:
        request.chain = self.store.new_chain(
            request.tokens,
            tenant=request.tenant,
            conversation=request.conversation or "",
            window=request.window,
            truncation=request.truncation,
        )
        self._queue_changed = True

    def _reserve_or_preempt(self, request: Request, budget: int) -> int:
        """Tokens of a running request for this step; 0: it had to give its place back."""
        while not (num_tokens := _reserve(request, budget)):
            victim = self.running[-1]
            if victim is request and len(self.running) == 1:
                while self.store.drain():  # what waits to be saved holds the slots
                    if num_tokens := _reserve(request, budget):
                        return num_tokens
                self._raise_full(request)
            self.retry(victim)
            if victim is request:
                break
        return num_tokens

    def _start(self, request: Request, budget: int, wait: bool) -> int:
        """Begins the first waiting request, if there is room; its tokens for this step, or 0.

        wait: nothing else runs, so finding no room ends in an error, not in waiting.
        """
        num_tokens = self._begin(request, budget)
        while not num_tokens and wait:
            if not self.store.drain():
                self._raise_full(request)
            num_tokens = self._begin(request, budget)
        if not num_tokens:
            request.no_room_since_s = request.no_room_since_s or time.perf_counter()
        else:
            request.note_room()
            self.waiting.popleft()
            self.running.append(request)
            request.state = RequestState.RUNNING
            self._queue_changed = True
        return num_tokens

    def _begin(self, request: Request, budget: int) -> int:
        cost = UNKNOWN_COST if self.always_load else self.prefill.cost()
        sequence = self.store.begin(request.chain, self.max_history, cost)
        if sequence is None:
            return 0
        request.sequence = sequence
        num_tokens = _reserve(request, budget)
        if not num_tokens:
            sequence.close()
            request.sequence = None
        elif not request.output_ids:  # later it would be what was computed before a preemption
            request.num_cached_tokens = sequence.cached.total
            request.cached_from = sequence.cached.by_tier
        return num_tokens

    def _raise_full(self, request: Request) -> None:
        error = StoreError(f"the pool cannot hold request {request.id} alone")
        error.code = "exhausted"
        raise error


def _reserve(request: Request, budget: int) -> int:
    """Cuts the context if it is full and reserves slots; the number of tokens, 0: pool full."""
    sequence = request.sequence
    assert sequence is not None
    if sequence.room == 0:
        sequence.truncate()
    num_tokens = min(request.num_remaining, budget, sequence.room)
    return num_tokens if sequence.reserve(num_tokens) else 0
