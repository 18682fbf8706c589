"""Language models of transformers, standard and linear, and the papers' experiments with them.

An input is one integer tensor of token ids in which -1 is padding; `models.py` wraps a model so
that it maps such a tensor to logits, and can be linearised. `perplexity.py` and `generation.py`
take standard and linear models alike; `experiments.py` says what the papers' experiments need.
"""
