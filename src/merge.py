"""Merges models; see `tangent_arithmetic.commands.merge`."""

from tangent_arithmetic.commands.merge import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
