"""The engine's thread, and what of it the event loop sees.

One thread owns the engine: it takes what is to be done from a queue, makes a step, and hands all events of
the step to the event loop in one call, because waking a loop costs as much as a token. The loop gives them
to the replies they belong to; a reply that is slow to be written finds several events at once, and writes
them at once.

A reply counts as gone when it is done, fails, or is dropped: then the engine's slots are freed, whatever
happens to the connection.
"""

import asyncio
import dataclasses
import gc
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from llm_jax.generate.engine import Engine
from llm_jax.generate.events import TokenEvent
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.serve.errors import ApiError
from llm_jax.serve.measures import Measures

logger = logging.getLogger("llm_jax.serve")

MakePrompt = Callable[[Engine], Sequence[int]]


class Job:
    """One completion of a request.

    make_prompt: gives the prompt's ids, in the engine's thread; ValueError says what is wrong with it.
    number: seeds the randomness together with `sampling.seed`.
    stop_tokens: ids that end it beside eos, as a chat's end mark does.

    Attributes:
      prompt: its ids, once it was accepted.
    """

    def __init__(
        self,
        make_prompt: MakePrompt,
        sampling: SamplingConfig,
        *,
        number: int = 0,
        alternatives: int = 0,
        stop_tokens: frozenset[int] = frozenset(),
    ):
        # Gone once it was called: what is cached by the engine would keep one that has failed.
        self.make_prompt: MakePrompt | None = make_prompt
        self.sampling, self.number = sampling, number
        self.alternatives, self.stop_tokens = alternatives, stop_tokens
        self.prompt: list[int] | None = None
        self.count = 0
        self.first_at = 0.0
        # Of the engine's thread alone: the engine's id; tokens so far, and how much of their text is told.
        self.request_id: int | None = None
        self.tokens: list[int] = []
        self.told = 0


@dataclasses.dataclass(frozen=True)
class _Accepted:
    prompt: list[int]


Arrival = tuple[Job, TokenEvent]
_Message = tuple["Reply", Job, TokenEvent | _Accepted | ApiError]


class Reply:
    """All completions of one request; lives in the event loop.

    deadline: of the event loop's clock, after which the request is given up.
    """

    def __init__(self, worker: "Worker", jobs: Sequence[Job], timeout: float):
        self.jobs, self._worker = list(jobs), worker
        self.started = time.perf_counter()
        loop = asyncio.get_running_loop()
        self.deadline = loop.time() + timeout
        # One timer for all: a time limit on each wait would cost as much as the rest of a token.
        late = ApiError(504, "the request took longer than this server allows")
        self._timer = loop.call_at(self.deadline, self.drop, late)
        self._arrived: list[Arrival] = []
        self._wake = asyncio.Event()
        self._error: ApiError | None = None
        self._unaccepted = len(self.jobs)
        self.open = len(self.jobs)

    async def accepted(self) -> None:
        """Waits until the engine has taken all prompts.

        Raises:
          ApiError: it has not; or the time is over.
        """
        while self._unaccepted:
            await self._news()
            if self._error is not None:
                raise self._error

    async def arrivals(self) -> list[Arrival]:
        """What came since the last call, one event at least; nothing at the end.

        Raises:
          ApiError: the request failed, or its time is over.
        """
        while not self._arrived and self.open:
            await self._news()
        if not self._arrived and self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, []
        return arrived

    async def _news(self) -> None:
        if self._error is None:
            await self._wake.wait()
        self._wake.clear()

    def drop(self, error: ApiError | None = None) -> None:
        """Ends what still runs; a caller that waits gets the error. May be called at any time, twice too."""
        self._worker.measures.cancelled.inc(self.open)
        self.fail(error or ApiError(499, "the client has left"))

    def fail(self, error: ApiError) -> None:
        """`drop` for what was refused or went wrong here, which does not count as cancelled."""
        if self.open:
            self._worker.drop(self)
            self._error, self.open = error, 0
            self._timer.cancel()
            self._wake.set()

    def _receive(self, job: Job, content: TokenEvent | _Accepted | ApiError) -> None:
        if not self.open:
            return  # dropped, and the engine did not know yet
        if isinstance(content, _Accepted):
            job.prompt = content.prompt
            self._unaccepted -= 1
        elif isinstance(content, ApiError):
            self.fail(content)
        else:
            self._arrived.append((job, content))
            job.count += 1
            if content.stop_reason is not None:
                self.open -= 1
                if not self.open:
                    self._timer.cancel()
        self._wake.set()


class Worker:
    """Runs completions. All but `_run` and what it calls belongs to the event loop.

    make_engine: called in the engine's thread, and again if the engine fails.
    """

    def __init__(self, make_engine: Callable[[], Engine], *, max_queue: int, timeout: float):
        self._make_engine, self._max_queue, self._timeout = make_engine, max_queue, timeout
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._replies: set[Reply] = set()
        self._jobs: dict[int, tuple[Reply, Job]] = {}  # by the engine's ids; of its thread alone
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._closing: str | None = None
        self.running = self.waiting = 0
        self.failure: str | None = None
        self.measures = Measures(lambda: self.running, lambda: self.waiting)

    async def start(self) -> None:
        """Makes the engine; raises what that raises."""
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._thread.start()
        await self._ready

    @property
    def open_jobs(self) -> int:
        return sum(reply.open for reply in self._replies)

    def submit(self, jobs: Sequence[Job]) -> Reply:
        """Raises ApiError where the server stops, is broken, or has too much to do."""
        if self._closing is not None or self.failure is not None:
            raise ApiError(503, self._closing or self.failure)
        self.check_count(len(jobs))
        if self.open_jobs + len(jobs) > self.num_slots + self._max_queue:
            raise ApiError(429, "the server has too much to do: try again later")
        reply = Reply(self, jobs, self._timeout)
        self._replies.add(reply)
        self._commands.put(lambda: self._start_jobs(reply))
        return reply

    def check_count(self, count: int) -> None:
        """Raises ApiError for more completions than there are ever places for."""
        most = self.num_slots + self._max_queue
        if count > most:
            message = f"{count} completions in one request: this server takes at most {most}"
            raise ApiError(400, message, param="n")

    def drop(self, reply: Reply) -> None:
        self._replies.discard(reply)
        self._commands.put(lambda: self._cancel(reply))

    def refuse(self, why: str) -> None:
        """From now on; what runs goes on."""
        self._closing = why

    async def drained(self, seconds: float) -> None:
        """Waits for what runs; what still does after so long is told, and ended."""
        end = self._loop.time() + seconds
        while self._replies and self._loop.time() < end:
            await asyncio.sleep(0.02)
        for reply in list(self._replies):
            reply.drop(ApiError(503, self._closing))

    async def close(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _deliver(self, messages: list[_Message], running: int, waiting: int) -> None:
        """In the loop: everything that one step of the engine has brought."""
        self.running, self.waiting = running, waiting
        now, tokens, measures = time.perf_counter(), 0, self.measures
        for reply, job, content in messages:
            if isinstance(content, TokenEvent) and reply.open:
                tokens += 1
                if content.index == 0:
                    job.first_at = now
                    measures.time_to_first_token.observe(now - reply.started)
                elif content.stop_reason is not None:
                    measures.time_per_token.observe((now - job.first_at) / content.index)
            elif isinstance(content, _Accepted):
                measures.prompt_tokens.inc(len(content.prompt))
            reply._receive(job, content)
            if not reply.open:
                self._replies.discard(reply)
        if tokens:
            measures.generated_tokens.inc(tokens)

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            self.engine = self._make_engine()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._ready.set_exception, error)
            return
        self.num_slots, self.max_length = self.engine.num_slots, self.engine.max_length
        self._loop.call_soon_threadsafe(self._ready.set_result, None)
        self._messages: list[_Message] = []
        while True:
            try:
                if not self._take_commands():
                    return
                if self.engine.has_work:
                    self._step()
            except Exception as error:
                self._recover(error)
            self._send()

    def _take_commands(self) -> bool:
        """Does what was asked for; waits for something to do. False at the end."""
        wait = not self.engine.has_work
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _start_jobs(self, reply: Reply) -> None:
        for job in reply.jobs:
            try:
                tokens = list(job.make_prompt(self.engine))
                job.make_prompt = None
                job.request_id = self.engine.submit(
                    tokens, job.sampling, number=job.number, top_alternatives=job.alternatives
                )
            except Exception as error:
                self._messages.append((reply, job, _refusal(error)))
                self._cancel(reply)
                return
            self._jobs[job.request_id] = (reply, job)
            self._messages.append((reply, job, _Accepted(tokens)))

    def _cancel(self, reply: Reply) -> None:
        for job in reply.jobs:
            # An engine that was made again counts from the start: the id may be another's by now.
            if self._jobs.get(job.request_id, (None, None))[1] is job:
                del self._jobs[job.request_id]
                self.engine.cancel(job.request_id)

    def _step(self) -> None:
        jobs, messages = self._jobs, self._messages
        for event in self.engine.step():
            reply, job = jobs[event.row]
            if job.stop_tokens:
                event = self._until_mark(job, event)
            if event.stop_reason is not None:
                del jobs[event.row]
            messages.append((reply, job, event))

    def _until_mark(self, job: Job, event: TokenEvent) -> TokenEvent:
        """At an end mark the last event, with the text that the engine held back for stops or UTF-8."""
        if event.token not in job.stop_tokens or event.stop_reason in ("eos", "stop"):
            job.tokens.append(event.token)
            job.told += len(event.text)
            return event
        self.engine.cancel(event.row)
        content = b"".join(self.engine.tokenizer.decode_bytes([token]) for token in job.tokens)
        text = content.decode("utf-8", errors="replace")[job.told :]
        return dataclasses.replace(event, text=text, stop_reason="stop")

    def _recover(self, error: Exception) -> None:
        """What ran is lost; a new engine takes what comes."""
        logger.error("the engine failed: %s", type(error).__name__, exc_info=error)
        told = ApiError(500, "the engine failed on this request")
        self._messages += [(reply, job, told) for reply, job in self._jobs.values()]
        self._jobs.clear()
        # Its memory, before another one takes as much: frames that failed hold it, and cycles do.
        self.engine, failed = None, error
        while failed is not None:
            traceback.clear_frames(failed.__traceback__)
            failed = failed.__context__
        gc.collect()
        try:
            self.engine = self._make_engine()
        except Exception as again:
            logger.error("and could not be made again", exc_info=again)
            self.failure = "the engine has failed: restart the server"
            self.engine = _Broken()

    def _send(self) -> None:
        messages, self._messages = self._messages, []
        counts = self.engine.num_running, self.engine.num_waiting
        try:
            self._loop.call_soon_threadsafe(self._deliver, messages, *counts)
        except RuntimeError:  # the loop is gone, and with it whoever waits
            logger.debug("events after the end of the event loop")


def _refusal(error: Exception) -> ApiError:
    """Why a prompt was not taken; only what is meant for users is told."""
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    logger.error("a prompt failed: %s", type(error).__name__, exc_info=error)
    return ApiError(500, "the server failed on this request")


class _Broken:
    """In the place of an engine: nothing runs."""

    num_running = num_waiting = 0
    has_work = False

    def cancel(self, number: int) -> None:
        pass
