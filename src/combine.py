"""Solves for coefficients; see `tangent_arithmetic.commands.combine`."""

from tangent_arithmetic.commands.cli import script

__all__ = ["main"]

main = script("combine")

if __name__ == "__main__":
    raise SystemExit(main())
