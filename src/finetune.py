"""Fine-tunes; see `tangent_arithmetic.commands.finetune`."""

from tangent_arithmetic.commands.finetune import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
