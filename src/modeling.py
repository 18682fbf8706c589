"""Image encoders and classification heads. Names of the public projects; see `encoders.images`."""

from tangent_arithmetic.encoders.classifiers import ImageClassifier, MultiHeadImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder

__all__ = ["ClassificationHead", "ImageClassifier", "ImageEncoder", "MultiHeadImageClassifier"]
