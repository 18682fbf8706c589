"""The command `tangent-arithmetic benchmark`; see `tangent_arithmetic.commands.benchmark`."""

from tangent_arithmetic.commands.cli import script

main = script("benchmark")

if __name__ == "__main__":
    raise SystemExit(main())
