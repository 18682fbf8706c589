"""Analyses a run; see `tangent_arithmetic.commands.analyze`."""

from tangent_arithmetic.commands.analyze import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
