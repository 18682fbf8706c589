"""Negates task vectors; see `tangent_arithmetic.commands.negate`."""

from tangent_arithmetic.commands.negate import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
