"""Adds task vectors; see `tangent_arithmetic.commands.add`."""

from tangent_arithmetic.commands.cli import script

__all__ = ["main"]

main = script("add")

if __name__ == "__main__":
    raise SystemExit(main())
