"""Data sets: the registry, the embedded suite, the public sets, loaders."""
