"""Preparation of the public data sets of suite clip8: downloading, arranging and verifying."""
