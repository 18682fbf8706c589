"""The report page and the tangent explorer."""
