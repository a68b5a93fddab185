"""`doge serve`: open the model, listen, answer until Ctrl-C."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
from typing import Any

from ...errors import UserError
from ..chat import untaught
from .settings import ServeRecipe


def serve(recipe: ServeRecipe) -> None:
    """Answer requests until Ctrl-C.

    Raises:
        UserError: if FastAPI or uvicorn is not there, the model cannot be opened, or the address cannot be listened at.
    """
    key = recipe.key()
    try:
        import uvicorn

        from .app import make_app
    except ImportError as error:
        raise UserError(f'`doge serve` needs FastAPI and uvicorn ({error}): pip install "small-doge[serve]"') from error
    from .models import open_served
    from .scheduler import Scheduler

    listening = listen(recipe.host, recipe.port)
    with listening:
        served = open_served(recipe)
        scheduler = Scheduler(recipe.max_active, recipe.max_waiting, recipe.tokens_a_turn)
        config = uvicorn.Config(make_app(recipe, served, scheduler), **server_options(recipe))
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{recipe.served_name} at {address}/v1, a page to chat at {address}/, with {served.how}; Ctrl-C ends it")
        if served.no_chat:
            print(f"it completes text and does not chat: {served.no_chat}", file=sys.stderr)
        elif stage := untaught(recipe.model):
            print(f"it is a base model (of `doge {stage}`): it continues text and was not taught to answer")
        if key is None and not ipaddress.ip_address(host).is_loopback:
            print("anyone who reaches this address may use it: --api_key env asks for a key", file=sys.stderr)
        sys.stdout.flush()
        try:
            server(config, scheduler).run(sockets=[listening])
        finally:
            scheduler.close()


def server(config: Any, scheduler: Any) -> Any:
    """A uvicorn server that ends the texts in progress before it waits for connections to end.

    Args:
        config: of uvicorn, its application a :class:`small_doge.inference.serve.guard.Guard`.
    """
    import uvicorn

    class Ending(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            await asyncio.get_running_loop().run_in_executor(None, scheduler.close)
            await super().shutdown(sockets)

    ending = Ending(config)
    config.app.connections = ending.server_state.connections  # in the same loop, which adds and removes them
    return ending


def server_options(recipe: ServeRecipe) -> dict[str, Any]:
    """What uvicorn is told."""
    from .connections import protocol

    return {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "lifespan": "off",
        "http": protocol(recipe.body_seconds, 2 * recipe.max_connections),
        "ws": "none",
        "loop": "asyncio",
        "proxy_headers": False,
        "timeout_keep_alive": 15,
        "timeout_graceful_shutdown": 3,
    }


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: if the address is not one of this machine or is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot listen at {host} port {port}: {reason}; choose another --host or --port") from error
