"""The public sets of suite clip8 on disk: fetched, arranged as the loaders read them, verified."""
