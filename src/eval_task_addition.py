"""Adds task vectors; see `tangent_arithmetic.commands.add`."""

from tangent_arithmetic.commands.add import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
