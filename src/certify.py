"""Certifies ranges of coefficients; see `tangent_arithmetic.commands.certify`."""

from tangent_arithmetic.commands.cli import script

__all__ = ["main"]

main = script("certify")

if __name__ == "__main__":
    raise SystemExit(main())
