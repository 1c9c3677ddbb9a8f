"""One call to many servers at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from opsd_megatron.rollout.pool.member import Member

Result = TypeVar("Result")


def call_each(
    members: Sequence[Member], threads: Executor, function: Callable[[Member], Result]
) -> tuple[dict[Member, Result], dict[Member, Exception]]:
    """(results, errors) by server, once all have answered."""
    futures = {member: threads.submit(function, member) for member in members}
    results: dict[Member, Result] = {}
    errors: dict[Member, Exception] = {}
    for member, future in futures.items():
        try:
            results[member] = future.result()
        except Exception as error:
            errors[member] = error
    return results, errors
