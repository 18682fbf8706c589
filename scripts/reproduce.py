"""The command `tangent-arithmetic reproduce`; see `tangent_arithmetic.commands.reproduce`."""

from tangent_arithmetic.commands.cli import script

main = script("reproduce")

if __name__ == "__main__":
    raise SystemExit(main())
