"""Independent sigmoid gates with a zero-one loss: several operations and scales may be summed."""

from __future__ import annotations

from posefabric.search.synchronous import Synchronous


class Gates(Synchronous):
    """FairDARTS (Chu et al., 2020): choices do not compete, each is in or out by itself.

    ``sparsity`` and ``source_sparsity`` weigh the zero-one loss, sum p (1 - p) of the gates.
    """

    name = "gates"
