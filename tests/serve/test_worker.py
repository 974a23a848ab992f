"""The engine's thread, with an engine that does as it is told."""

import asyncio
import functools
import time
import weakref

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers.raw_bytes import RawBytesTokenizer
from llm_jax.generate.events import RowStream, TokenEvent
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.serve.errors import ApiError
from llm_jax.serve.worker import Job, Worker


class FakeEngine:
    """Each request gets a token per step, `max_tokens` in all; token 13 makes a step fail."""

    num_slots, max_length = 2, 100
    tokenizer = RawBytesTokenizer(("<|end|>",))
    made = 0
    broken = False

    def __init__(self):
        if FakeEngine.broken:
            raise MemoryError("no room")
        FakeEngine.made += 1
        self.requests, self.next, self.cancelled = {}, 0, []

    def submit(self, prompt, sampling, *, number, top_alternatives):
        if prompt == [7]:
            raise ConfigError("seven is no prompt")
        if prompt == [8]:
            raise KeyError("a secret of the server")
        self.next += 1
        self.requests[self.next] = [prompt, sampling.max_tokens, 0]
        return self.next

    def cancel(self, number):
        self.cancelled.append(number)
        self.requests.pop(number, None)

    @property
    def has_work(self):
        return bool(self.requests)

    num_running = property(lambda self: min(2, len(self.requests)))
    num_waiting = property(lambda self: max(0, len(self.requests) - 2))

    def step(self):
        events = []
        for number, entry in list(self.requests.items())[:2]:
            prompt, most, index = entry
            if prompt == [13]:
                raise RuntimeError("boom")
            entry[2] += 1
            reason = "max_tokens" if entry[2] == most else None
            events.append(TokenEvent(number, index, 5 + index, "x", -1.0, (), reason))
            if reason:
                del self.requests[number]
        return events


def job(*prompt, max_tokens=3, **options):
    return Job(lambda _: list(prompt), SamplingConfig(max_tokens=max_tokens), **options)


def run(test, *, max_queue=4, timeout=10.0, make_engine=FakeEngine):
    """Runs `test(worker)` beside a worker, which afterwards holds nothing."""

    async def main():
        worker = Worker(make_engine, max_queue=max_queue, timeout=timeout)
        await worker.start()
        await test(worker)
        for _ in range(200):
            if not (worker.open_jobs or worker.running or worker.waiting):
                break
            await asyncio.sleep(0.01)
        assert (worker.open_jobs, worker.running, worker.waiting) == (0, 0, 0)
        await worker.close()

    FakeEngine.made, FakeEngine.broken = 0, False
    asyncio.run(main())


async def read(reply):
    events = []
    while arrived := await reply.arrivals():
        events += arrived
    return events


def test_events_reach_the_jobs_they_belong_to():
    async def test(worker):
        jobs = [job(number, max_tokens=number) for number in (1, 2, 3, 4)]
        reply = worker.submit(jobs)
        await reply.accepted()
        events = await read(reply)
        for number, one in enumerate(jobs, start=1):
            assert one.prompt == [number]
            assert [event.index for owner, event in events if owner is one] == list(range(number))
            assert one.count == number
        assert await reply.arrivals() == []

    run(test)


@pytest.mark.parametrize(
    ("prompt", "status", "message"),
    [(7, 400, "seven is no prompt"), (8, 500, "the server failed on this request")],
)
def test_a_prompt_that_is_not_taken_ends_its_whole_request_alone(prompt, status, message):
    async def test(worker):
        other = worker.submit([job(1, max_tokens=30)])
        reply = worker.submit([job(1, max_tokens=10**6), job(prompt), job(1)])
        with pytest.raises(ApiError, match=message) as error:
            await reply.accepted()
        assert error.value.status == status
        assert len(await read(other)) == 30
        assert FakeEngine.made == 1

    run(test)


def test_an_engine_that_fails_is_made_again():
    async def test(worker):
        other, reply = worker.submit([job(1, max_tokens=10**6)]), worker.submit([job(13)])
        for one in (other, reply):
            with pytest.raises(ApiError, match="the engine failed") as error:
                await read(one)
            assert error.value.status == 500
        assert len(await read(worker.submit([job(1)]))) == 3
        assert FakeEngine.made == 2
        assert worker.failure is None

    run(test)


def test_ids_of_an_engine_that_failed_mean_nothing_to_the_next():
    async def test(worker):
        failing = worker.submit([job(13)])
        # Taken by the new engine, under the same id, before the loop knows that the old one failed.
        while FakeEngine.made < 2:
            time.sleep(0.001)
        other = worker.submit([job(1, max_tokens=5000)])
        time.sleep(0.01)
        with pytest.raises(ApiError, match="the engine failed"):
            await read(failing)
        assert len(await read(other)) == 5000

    run(test)


def test_an_engine_that_cannot_be_made_again():
    async def test(worker):
        FakeEngine.broken = True
        with pytest.raises(ApiError, match="the engine failed"):
            await read(worker.submit([job(13)]))
        for _ in range(100):
            if worker.failure:
                break
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="restart the server") as error:
            worker.submit([job(1)])
        assert error.value.status == 503

    run(test)


def test_an_engine_that_cannot_be_made_at_all():
    async def main():
        FakeEngine.broken = True
        with pytest.raises(MemoryError, match="no room"):
            await Worker(FakeEngine, max_queue=1, timeout=1.0).start()

    asyncio.run(main())


def test_stop_tokens():
    async def test(worker):
        events = await read(worker.submit([job(1, max_tokens=10**6, stop_tokens=frozenset({7}))]))
        assert [event.token for _, event in events] == [5, 6, 7]
        assert events[-1][1].stop_reason == "stop"

    run(test)


class Speaker(FakeEngine):
    """Says a prompt back, through the engine's own stream."""

    def submit(self, prompt, sampling, *, number, top_alternatives):
        self.next += 1
        stream = RowStream(
            self.next, self.tokenizer, max_tokens=sampling.max_tokens, room=99, stops=sampling.stops
        )
        self.requests[self.next] = (list(prompt), stream)
        return self.next

    def step(self):
        events = []
        for number, (left, stream) in list(self.requests.items()):
            events.append(stream.event(left.pop(0), -1.0, ()))
            if stream.stopped:
                del self.requests[number]
        return events


@pytest.mark.parametrize(
    ("said", "most", "text", "reason"),
    [
        (b"I like U", 50, "I like U", "stop"),
        (b"I like U", 9, "I like U", "stop"),  # the mark is the last token there may be
        (b"I like U", 8, "I like U", "max_tokens"),
        (b"\xe4\xbd\xa0\xe4", 50, "\u4f60\ufffd", "stop"),
        (b"I User: x", 50, "I ", "stop"),
    ],
)
def test_what_was_held_back_comes_with_an_end_mark(said, most, text, reason):
    mark = Speaker.tokenizer.vocab_size - 1
    sampling = SamplingConfig(max_tokens=most, stops=("User:",))

    async def test(worker):
        one = Job(lambda _: [*said, mark, *b"never"], sampling, stop_tokens=frozenset({mark}))
        events = [event for _, event in await read(worker.submit([one]))]
        assert "".join(event.text for event in events) == text
        assert [event.stop_reason for event in events] == [None] * (len(events) - 1) + [reason]

    run(test, make_engine=Speaker)


def test_an_engine_that_failed_is_gone_before_the_next_is_made():
    class Cyclic(FakeEngine):
        last, left = None, []

        def __init__(self):
            super().__init__()
            self.itself = self
            Cyclic.left.append(Cyclic.last is None or Cyclic.last() is None)
            Cyclic.last = weakref.ref(self)

    async def test(worker):
        keeps = functools.cache(lambda engine: [13])
        jobs = [Job(keeps, SamplingConfig(max_tokens=3))]
        del keeps
        with pytest.raises(ApiError, match="the engine failed"):
            await read(worker.submit(jobs))
        assert len(await read(worker.submit([job(1)]))) == 3
        assert Cyclic.left == [True, True]

    run(test, make_engine=Cyclic)


def test_what_counts_as_cancelled():
    async def test(worker):
        for prompt in (7, 8, 13):
            with pytest.raises(ApiError):
                await read(worker.submit([job(prompt)]))
        await read(worker.submit([job(1)]))
        gone = worker.submit([job(1, max_tokens=10**6)] * 1)
        await gone.arrivals()
        gone.drop()
        gone.drop()
        assert b"llm_jax_cancelled_completions_total 1.0\n" in worker.measures.page()

    run(test)


def test_a_dropped_request_frees_its_slots_and_gets_nothing_more():
    async def test(worker):
        reply = worker.submit([job(1, max_tokens=10**6) for _ in range(3)])
        await reply.arrivals()
        reply.drop()
        reply.drop()
        with pytest.raises(ApiError) as error:
            await read(reply)
        assert error.value.status == 499
        assert worker.open_jobs == 0
        assert len(await read(worker.submit([job(1)]))) == 3

    run(test)


def test_the_queue_is_bounded():
    async def test(worker):
        with pytest.raises(ApiError, match="at most 6") as error:
            worker.submit([job(1) for _ in range(7)])
        assert error.value.status == 400
        replies = [worker.submit([job(1, max_tokens=10**6)] * 1) for _ in range(6)]
        with pytest.raises(ApiError) as error:
            worker.submit([job(1)])
        assert error.value.status == 429
        replies[0].drop()
        last = worker.submit([job(1)])
        for reply in replies[1:]:
            reply.drop()
        assert len(await read(last)) == 3

    run(test)


def test_the_time_of_a_request():
    async def test(worker):
        reply = worker.submit([job(1, max_tokens=10**6)])
        with pytest.raises(ApiError) as error:
            await read(reply)
        assert error.value.status == 504

    run(test, timeout=0.05)


def test_draining():
    async def test(worker):
        short, long = (
            worker.submit([job(1, max_tokens=50)]),
            worker.submit([job(1, max_tokens=10**7)]),
        )
        worker.refuse("the server is stopping")
        with pytest.raises(ApiError, match="stopping"):
            worker.submit([job(1)])
        reading = asyncio.create_task(read(short))
        await worker.drained(0.2)
        assert len(await reading) == 50
        with pytest.raises(ApiError, match="stopping") as error:
            await read(long)
        assert error.value.status == 503

    run(test)
