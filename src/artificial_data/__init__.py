"""The study on artificial data; see `tangent_arithmetic.artificial_data`."""
