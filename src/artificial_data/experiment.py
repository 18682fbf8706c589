"""The study on artificial data; see `tangent_arithmetic.artificial_data.experiment`."""

from tangent_arithmetic.artificial_data.experiment import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
