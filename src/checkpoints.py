"""Inspects and converts checkpoints; see `tangent_arithmetic.commands.checkpoint`."""

from tangent_arithmetic.commands.checkpoint import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
