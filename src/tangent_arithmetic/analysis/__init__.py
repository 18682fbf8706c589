"""The analyses of the papers, one per module: tables, and figures of them."""
