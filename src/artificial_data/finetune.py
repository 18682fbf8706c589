"""The study on artificial data; see `tangent_arithmetic.artificial_data.finetune`."""

from tangent_arithmetic.artificial_data.finetune import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
