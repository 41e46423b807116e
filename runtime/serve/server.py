"""The socket, and the life of a server: from binding to Ctrl-C."""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import signal
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_deploy.errors import UsageError
from mla_deploy.runtime.engine import Engine

if TYPE_CHECKING:
    import uvicorn

    from mla_deploy.runtime.serve.app import Service

QUEUE_PER_SLOT = 4
"""Requests that may wait for each sequence that can be under way."""

SPARE_CONNECTIONS = 64
"""Besides those of requests that are under way or wait: each may bring a body before it waits."""

CLOSING_SECONDS = 5
"""After the last answer has ended, for connections to close."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def require_extra() -> None:
    """Raise a UsageError unless the packages of the extra `serve` are installed."""
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{name} is not installed", hint="pip install fastapi uvicorn")


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet; port 0: any that is free.

    Raises:
        UsageError: the port is in use, or the address is none of this machine.
    """
    opened: socket.socket | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        if opened is not None:
            opened.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"the port is in use at {host}",
                found=port,
                hint="choose another with --port; 0 takes any that is free",
            ) from None
        raise UsageError(
            f"the server cannot listen at {host}",
            found=f"port {port}: {error.strerror or error}",
            allowed="an address of this machine, and a port from 1024 to 65535 for most users",
        ) from None
    return opened


@dataclass(frozen=True)
class ServerOptions:
    """How requests are served.

    Attributes:
        model_name: what the model is called; None: as the bundle's folder.
        parallel: sequences that advance together.
        api_key: what requests must bring as a bearer token; None: nothing.

    Raises:
        UsageError: a value outside its range.
    """

    model_name: str | None = None
    parallel: int = 8
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise UsageError("parallel is out of range", found=self.parallel, allowed="1 or more")
        if self.api_key is not None and not self.api_key.strip():
            raise UsageError(
                "the key is empty", hint="choose a long random one, or give none to need none"
            )


class Server:
    """A loaded bundle at a bound socket.

    Attributes:
        url: what clients take as base URL.
        warnings: what the user should know before it runs.
    """

    def __init__(self, engine: Engine, bound: socket.socket, options: ServerOptions) -> None:
        """Needs the extra `serve`.

        Raises:
            UsageError: the bundle is one of TensorRT engines.
            TokenizerError: it has no tokenizer.
        """
        if not engine.batches:
            raise UsageError(
                "a bundle of TensorRT engines cannot be served",
                found="engines that compute one sequence at a time",
                hint="export the model with --to onnx --target cuda, or use `mla-deploy run`",
            )
        from mla_deploy.runtime.serve.app import Service, Settings

        host, port = bound.getsockname()[:2]
        is_local = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        self.model_name = options.model_name or engine.bundle.path.resolve().name
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        self.warnings = [] if is_local or options.api_key else [_OPEN.format(host)]
        self._socket = bound
        settings = Settings(
            model_name=self.model_name,
            parallel=options.parallel,
            queue=QUEUE_PER_SLOT * options.parallel,
            api_key=options.api_key,
            hosts=LOCAL_NAMES | {host} if is_local and options.api_key is None else None,
        )
        most = settings.parallel + settings.queue + SPARE_CONNECTIONS
        self._uvicorn = _uvicorn_server(Service(engine, settings), most)

    def run(self) -> None:
        """Serve until Ctrl-C, SIGTERM or `stop`; requests under way are then ended.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
        """
        if threading.current_thread() is not threading.main_thread():
            self._uvicorn.run([self._socket])
            return
        # For a signal that comes before uvicorn looks for it; and uvicorn raises the one that ended
        # it once more, for whoever was there before.
        before = signal.signal(signal.SIGTERM, lambda *_: self.stop())
        try:
            self._uvicorn.run([self._socket])
        finally:
            signal.signal(signal.SIGTERM, before)

    def stop(self) -> None:
        """End `run`; from any thread."""
        self._uvicorn.should_exit = True


_OPEN = (
    "anyone who reaches {} can use the model: give the server a key, in the environment variable "
    "MLA_DEPLOY_API_KEY, or bind it to 127.0.0.1"
)


def _uvicorn_server(service: Service, most_connections: int) -> uvicorn.Server:
    import uvicorn

    class StoppingServer(uvicorn.Server):
        """Ends the requests under way, for which it would wait otherwise."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await service.stop()
            await super().shutdown(sockets)

    return StoppingServer(
        uvicorn.Config(
            service.app(),
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=most_connections,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
    )
