"""Inspects and converts checkpoints; see `tangent_arithmetic.commands.checkpoint`."""

from tangent_arithmetic.commands.cli import script

__all__ = ["main"]

main = script("checkpoint")

if __name__ == "__main__":
    raise SystemExit(main())
