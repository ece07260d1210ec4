"""Where components live and how they are called: the only thing that differs between one process and a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_pbsd.controller.placement import Demand


class Future(Protocol):
    """A result that may not be there yet. `name`: the component that owes it."""

    @property
    def name(self) -> str: ...


class Handle(Protocol):
    """A component somewhere. Picklable: components may hold and call the handles of others.

    Calls run one after the other, in order, all in one thread (the constructor's), and never block the caller.
    """

    @property
    def name(self) -> str: ...

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Future:
        """Run `component.method(*args, **kwargs)`."""

    def observe(self, method: str, /, *args: Any, **kwargs: Any) -> Future:
        """The same in a second thread, beside a running call: for methods that only read, or say that they may."""

    def ready(self) -> Future:
        """Done when the component has been constructed; fails with what its constructor raised."""


class Machine(Protocol):
    """One that components run on. device: the first of its GPUs that is meant for the component it was asked for;
    None where that has not been decided."""

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> str:
        """By which components elsewhere reach those on it."""

    @property
    def device(self) -> int | None: ...

    def free_port(self) -> int:
        """Of it, that nobody listens on at the moment."""

    def memory_folder(self) -> str:
        """A folder in its shared memory, the same for all components on it, until the runtime is closed."""


class Client(Protocol):
    """What a holder of handles needs. Picklable."""

    def wait(
        self, futures: Sequence[Future], count: int = 1, timeout: float | None = None
    ) -> tuple[list[Future], list[Future]]:
        """(done, pending), each in the order given, once `count` are done or after `timeout` seconds."""

    def result(self, future: Future) -> Any:
        """The returned value, waited for. Raises what the method raised, or ComponentDied."""

    def stacks(self, futures: Sequence[Future]) -> str:
        """Where the components that owe these futures are now: Python stacks of all their threads."""

    def end(self, futures: Sequence[Future]) -> bool:
        """End the processes of the components that owe these futures, whatever state they are in; they are gone when it
        returns. False, and nothing is done, where components have no processes of their own."""


class Runtime(Client, Protocol):
    @property
    def client(self) -> Client:
        """What to hand to components that call others."""

    def spawn(self, name: str, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Handle:
        """Start `factory(*args, **kwargs)`, a picklable class or function, as component `name`, without waiting."""

    def machine(self, name: str) -> Machine:
        """Where component `name` is, or will be when it is spawned."""

    def parts(self, name: str) -> list[str]:
        """The components, each on a machine of its own, that engine `name` is made of, itself first."""

    def share(self, value: Any) -> Any:
        """Store an argument once for many receivers: pass what is returned, as an argument itself, in its place.

        Receivers must not write to it: they may all see the same memory.
        """

    def close(self) -> None:
        """End all components and everything started for them."""

    def __enter__(self) -> Runtime: ...

    def __exit__(self, *exception: object) -> None: ...


def open_runtime(
    kind: Literal["ray", "inline"], logs: Path, port: int | None = None, address: str | None = None,
    demand: Demand | None = None,
) -> Runtime:
    """Start a runtime. `logs`: folder for a log file per component. `port`: of the Ray head, None for any free one.

    address: 'host:port' of a Ray cluster that exists and is to be joined; `demand` says what is spread over it.
    """
    if kind == "inline":
        from megatron_pbsd.controller.inline import InlineRuntime

        return InlineRuntime()
    if address is not None:
        from megatron_pbsd.controller.joined_cluster import JoinedRay

        return JoinedRay(logs, address, demand or Demand(0))
    from megatron_pbsd.controller.ray_cluster import RayRuntime

    return RayRuntime(logs, port)
