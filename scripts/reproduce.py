"""The command `tangent-arithmetic reproduce`; see `tangent_arithmetic.commands.reproduce`."""

from tangent_arithmetic.commands.reproduce import main

if __name__ == "__main__":
    raise SystemExit(main())
