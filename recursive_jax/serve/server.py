"""The application on a socket, by uvicorn; a signal lets what is in work end."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from recursive_jax.errors import InputError, say
from recursive_jax.generate.hidden_score import denoising
from recursive_jax.generate.prefill import check_writer
from recursive_jax.generate.remote.model import Remote
from recursive_jax.models.model import Model
from recursive_jax.serve.app import Limits, application


class _Server(uvicorn.Server):
    """uvicorn's, which takes signals as requests to end, and does not raise them again when it has."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {n: signal.signal(n, self.handle_exit) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def serve(model: Model, name: str, host: str, port: int, limits: Limits, grace: int = 30) -> None:
    """Serves until SIGTERM or Ctrl-C; then takes no more, and gives what is in work `grace` seconds. Raises InputError
    where the address is taken."""
    if isinstance(model, Remote):
        raise InputError(f"{model.source} is behind a server already")
    if model.network.causal:
        if denoising(model) is not None:
            raise InputError("this model was trained to write out of order, and a server writes from left to right")
        check_writer(model)  # an encoder embeds
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"--host={host} --port={port}: {error}") from None
    config = uvicorn.Config(
        application(model, name, limits), log_level="warning", access_log=False, timeout_graceful_shutdown=grace
    )
    if limits.token is None and host not in ("127.0.0.1", "::1", "localhost"):
        say(f"--host {host} without --token-env: whoever reaches this machine may ask the model")
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}/v1"
    print(f"serving {name} at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    _Server(config).run(sockets=[listening])
