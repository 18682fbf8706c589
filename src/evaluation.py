"""The artificial-data study's evaluation, under the name that the public README imports.

It is written in `src/artificial_data/evaluation.py`; images are evaluated by `src/eval.py`.
"""

from src.artificial_data.evaluation import eval_single_dataset

__all__ = ["eval_single_dataset"]
