"""Fine-tunes; see `tangent_arithmetic.commands.finetune`."""

from tangent_arithmetic.commands.cli import script

__all__ = ["main"]

main = script("finetune")

if __name__ == "__main__":
    raise SystemExit(main())
