"""The command `tangent-arithmetic prepare-data`; see `tangent_arithmetic.commands.prepare_data`."""

from tangent_arithmetic.commands.cli import script

main = script("prepare-data")

if __name__ == "__main__":
    raise SystemExit(main())
