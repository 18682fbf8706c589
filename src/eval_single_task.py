"""Evaluates single tasks; see `tangent_arithmetic.commands.evaluate`."""

from tangent_arithmetic.commands.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
