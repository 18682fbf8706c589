"""Merges models; see `tangent_arithmetic.commands.merge`."""

from tangent_arithmetic.commands.cli import script

__all__ = ["main"]

main = script("merge")

if __name__ == "__main__":
    raise SystemExit(main())
