"""The flags of every command. Names of the public projects; see `tangent_arithmetic.run.args`."""

from tangent_arithmetic.run.args import Config, parse_arguments

__all__ = ["Config", "parse_arguments"]
