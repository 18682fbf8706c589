"""The study on artificial data: MLPs on `make_classification` tasks, edited by arithmetic."""
