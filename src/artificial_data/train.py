"""The study on artificial data; see `tangent_arithmetic.artificial_data.train`."""

from tangent_arithmetic.artificial_data.train import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
