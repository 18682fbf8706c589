"""Evaluates single tasks; see `tangent_arithmetic.commands.evaluate`."""

from tangent_arithmetic.commands.cli import script

__all__ = ["main"]

main = script("evaluate")

if __name__ == "__main__":
    raise SystemExit(main())
