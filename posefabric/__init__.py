"""posefabric searches, trains and ships small part-specific pose networks."""

__version__ = "0.1.0"
