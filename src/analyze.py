"""Analyses a run; see `tangent_arithmetic.commands.analyze`."""

from tangent_arithmetic.commands.cli import script

__all__ = ["main"]

main = script("analyze")

if __name__ == "__main__":
    raise SystemExit(main())
