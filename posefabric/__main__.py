"""``python -m posefabric`` is the console script."""

from posefabric.cli import main

if __name__ == "__main__":
    main()
