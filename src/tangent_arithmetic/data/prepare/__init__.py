"""Preparation of the public data sets of clip8, clip14 and clip20: fetch, arrange and verify."""
