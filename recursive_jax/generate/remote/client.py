"""Many requests at once: as many as the server bears, tried again where that helps, within a budget."""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import threading
from collections.abc import Callable
from typing import Any

import httpx2

from recursive_jax.config import RemoteConfig
from recursive_jax.errors import EXIT_PREEMPTED, InputError, RecursiveJaxError
from recursive_jax.generate.remote.wire import Again, Question, Reply, Wrong, meaning

FIRST = 4  # requests at once in the beginning
SLOWLY = 0.2  # more at once for as many replies as are under way, after the server was too busy once
LARGEST = 32 * 2**20  # bytes of an answer
LONGEST = 60.0  # seconds between two tries, unless the server asks for more


class Unreachable(RecursiveJaxError):
    """Nobody answers any more; what came is kept, and the same command goes on."""

    exit_code = EXIT_PREEMPTED


class BudgetReached(InputError):
    """The next request could cost more than is left."""


class Gate:
    """How many may be under way: the number grows with every reply, doubling at first, and is halved where the server
    is too busy (as TCP does, RFC 5681); then all wait as long as it asks."""

    def __init__(self, most: int):
        self.most, self.limit, self.active = most, float(min(FIRST, most)), 0
        self._start, self._until, self._halved = True, 0.0, 0.0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        async with self._changed:
            while True:
                wait = self._until - loop.time()
                if wait <= 0 and self.active < int(self.limit):
                    self.active += 1
                    return
                try:
                    await asyncio.wait_for(self._changed.wait(), wait if wait > 0 else None)
                except TimeoutError:
                    pass

    async def __aexit__(self, *error: Any) -> None:
        async with self._changed:
            self.active -= 1
            self._changed.notify_all()

    def grow(self) -> None:
        self.limit = min(float(self.most), self.limit + (1.0 if self._start else SLOWLY / self.limit))

    def shrink(self, after: float) -> None:
        now = asyncio.get_running_loop().time()
        if now > self._halved + 1.0:  # requests that were sent together are refused together
            self.limit, self._start, self._halved = max(1.0, self.limit / 2), False, now
        self._until = max(self._until, now + after)


class Spending:
    """Tokens and dollars so far, and those that requests under way could come to."""

    def __init__(self, config: RemoteConfig, spent: tuple[int, int] = (0, 0)):
        self.config, self.read, self.written = config, *spent
        self._held: dict[int, tuple[int, int]] = {}
        self._changed = asyncio.Condition()

    def _fits(self, more: tuple[int, int]) -> bool:
        held = [*self._held.values(), more]
        read, written = self.read + sum(h[0] for h in held), self.written + sum(h[1] for h in held)
        tokens, cost = self.config.max_tokens, self.config.max_cost
        return (tokens is None or read + written <= tokens) and (
            cost is None or self.config.cost(read, written) <= cost
        )

    async def hold(self, number: int, more: tuple[int, int]) -> None:
        """Waits until the request fits beside those under way. Raises BudgetReached where it does not fit alone."""
        async with self._changed:
            while not self._fits(more):
                if not self._held:
                    raise BudgetReached(self._reached())
                await self._changed.wait()
            self._held[number] = more

    async def settle(self, number: int, reply: Reply | None) -> None:
        async with self._changed:
            self._held.pop(number, None)
            if reply is not None:
                self.read, self.written = self.read + reply.input_tokens, self.written + reply.output_tokens
            self._changed.notify_all()

    def _reached(self) -> str:
        config = self.config
        limits = [f"remote.max_tokens={config.max_tokens:,}"] if config.max_tokens is not None else []
        limits += [f"remote.max_cost={config.max_cost:g}"] if config.max_cost is not None else []
        spent = f"{self.read + self.written:,} tokens, ${self.config.cost(self.read, self.written):.4f}"
        return (
            f"the budget is used up ({' and '.join(limits)}): {spent} so far, and the next request could go beyond it; "
            "every reply is kept: raise it, and the same command goes on"
        )


class Client:
    """Asks one server, on a thread of its own. key: what to authenticate with; it is taken out of everything that
    comes back. Close it when done: what is under way is given up."""

    def __init__(self, url: str, config: RemoteConfig, key: str | None, spent: tuple[int, int] = (0, 0)):
        self.url, self.config, self._key = url, config, key
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._number, self.retried = 0, 0
        self._call(self._open(spent))

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self, spent: tuple[int, int]) -> None:
        limits = httpx2.Limits(max_connections=self.config.concurrency + 1, max_keepalive_connections=None)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx2.AsyncClient(headers=headers, limits=limits, timeout=self.config.timeout)
        self.gate, self.spending = Gate(self.config.concurrency), Spending(self.config, spent)
        self._last_reply, self._replied = self._loop.time(), False

    def close(self) -> None:
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    def submit(self, question: Question, keep: Callable[[Reply], None]) -> concurrent.futures.Future:
        """A Future of its Reply. keep: called with what the server wrote, on the client's thread, before anything else
        is done with it. The future raises InputError where the server takes no such requests at all, Unreachable and
        BudgetReached."""
        self._number += 1
        return asyncio.run_coroutine_threadsafe(self._ask(question, keep, self._number), self._loop)

    def check(self) -> list[str] | None:
        """The models that the server names (None: it does not say). Raises InputError where nobody answers, or the key
        is not taken."""
        code, _, data = self._call(self._send("GET", "models", None, 30.0))
        if code is None:
            raise InputError(f"nobody answers at {self.url}: {data}")
        if code in (401, 403):
            raise InputError(self._refused(code))
        try:
            value = httpx2.Response(code, content=data).json()
            return [str(one["id"]) for one in value["data"]] if code == 200 else None
        except (ValueError, KeyError, TypeError):
            return None

    def _refused(self, code: int) -> str:
        name = self.config.key_env
        what = f"the key in {name} is not taken" if self._key else f"it wants a key, and {name} is not set"
        return f"{self.url} answers {code}: {what} (remote.key_env={name})"

    async def _ask(self, question: Question, keep: Callable[[Reply], None], number: int) -> Reply:
        read, written = question.ceiling
        limited = self.config.max_tokens is not None or self.config.max_cost is not None
        if limited and written is None:
            raise InputError("a budget needs a limit of what a reply may cost: set sampling.max_tokens")
        await self.spending.hold(number, (read, written or 0))
        reply = None
        try:
            reply = await self._tried(question, keep)
        finally:
            await self.spending.settle(number, reply)
        if limited and reply.text and not reply.output_tokens:
            raise InputError(f"{self.url} does not count tokens (`usage`), so that a budget cannot be kept")
        return reply

    async def _tried(self, question: Question, keep: Callable[[Reply], None]) -> Reply:
        begin, failures = self._loop.time(), 0
        while True:
            async with self.gate:
                found = await self._try(question)
            if not isinstance(found, Again):
                self._last_reply = self._loop.time()
            if isinstance(found, Reply):
                keep(found)
                self._replied = True
                self.gate.grow()
                return found
            if isinstance(found, Wrong):
                while not self._replied and self.gate.active:  # others tell whether it is this one alone
                    await asyncio.sleep(0.02)
                return self._wrong(found)
            self.retried += 1
            failures += found.of_row
            now = self._loop.time()
            if failures >= self.config.tries and self._last_reply > begin:
                return Reply("", found.status)
            if now - self._last_reply > self.config.patience:
                raise Unreachable(
                    f"{self.url}: no reply for {self.config.patience:g} seconds ({found.why}); every reply so far is "
                    "kept, the same command goes on"
                )
            wait = min(LONGEST, self.config.backoff * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)
            if found.busy:
                self.gate.shrink(wait if found.after is None else found.after)
            await asyncio.sleep(wait if found.after is None else found.after)

    def _wrong(self, found: Wrong) -> Reply:
        """One request that is not taken costs its row; where none was taken so far, the call."""
        if found.status in ("prompt_too_long", "refused"):
            return Reply("", found.status)
        code = int(found.status.partition(":")[2])
        if code in (401, 403):
            raise InputError(self._refused(code))
        if not self._replied or code in (404, 429) or 300 <= code < 400:
            raise InputError(f"{self.url} does not take the request ({code}): {found.message}{self._hint(code, found)}")
        return Reply("", found.status)

    def _hint(self, code: int, found: Wrong) -> str:
        if "chat template" in found.message:
            return "; `chat: false` in the template, or remote.api=completions, asks texts"
        return f"; is it {self.url}/v1?" if code == 404 and not self.url.endswith("/v1") else ""

    async def _try(self, question: Question) -> Reply | Again | Wrong:
        body = {name: value for name, value in question.body.items() if value is not None}
        code, headers, data = await self._send("POST", question.endpoint, body, self.config.timeout)
        if code is None:
            return Again("timeout" if data == TIMEOUT else "error:connection", str(data), of_row=headers["of_row"])
        return meaning(code, headers, data, question.endpoint)

    async def _send(self, method: str, path: str, body: Any, seconds: float) -> tuple[int | None, Any, Any]:
        """(code, headers, content); where there is none (None, whether the request itself may be at fault, why)."""
        try:
            async with asyncio.timeout(seconds):
                async with self._http.stream(method, f"{self.url}/{path}", json=body) as response:
                    parts, size = [], 0
                    async for part in response.aiter_bytes():
                        parts.append(part)
                        size += len(part)
                        if size > LARGEST:
                            return 413, {}, b"the answer is too large"
            data = b"".join(parts)
            data = data.replace(self._key.encode(), b"***") if self._key else data
            return response.status_code, response.headers, data
        except (TimeoutError, httpx2.TimeoutException):
            return None, {"of_row": True}, TIMEOUT
        except httpx2.ConnectError as error:
            return None, {"of_row": False}, self._clean(error)
        except httpx2.HTTPError as error:
            return None, {"of_row": True}, self._clean(error)

    def _clean(self, error: Exception) -> str:
        text = str(error) or type(error).__name__
        return text.replace(self._key, "***") if self._key else text


TIMEOUT = "no answer in time"
