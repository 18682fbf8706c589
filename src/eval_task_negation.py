"""Negates task vectors; see `tangent_arithmetic.commands.negate`."""

from tangent_arithmetic.commands.cli import script

__all__ = ["main"]

main = script("negate")

if __name__ == "__main__":
    raise SystemExit(main())
