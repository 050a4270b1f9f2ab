"""Several processes as one: who each is, what they add up, who writes, and what if one dies."""

from posefabric.distributed.adder import Adder
from posefabric.distributed.launch import Launch, is_first, launched, share
from posefabric.distributed.ranks import (
    adder,
    any_rank,
    broadcast,
    check_equal,
    first_told,
    from_first,
    gather,
    in_step,
    on_each,
    place,
    sum_gradients,
    summed,
)
from posefabric.distributed.session import joined
from posefabric.distributed.watch import RankLost

__all__ = [
    "Adder",
    "Launch",
    "RankLost",
    "adder",
    "any_rank",
    "broadcast",
    "check_equal",
    "first_told",
    "from_first",
    "gather",
    "in_step",
    "is_first",
    "joined",
    "launched",
    "on_each",
    "place",
    "share",
    "sum_gradients",
    "summed",
]
