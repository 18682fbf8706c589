"""The command `tangent-arithmetic prepare-data`; see `tangent_arithmetic.commands.prepare_data`."""

from tangent_arithmetic.commands.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())
