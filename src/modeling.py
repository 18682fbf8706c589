"""Image encoders and classification heads. Names of the public projects; see `encoders.images`."""

from tangent_arithmetic.encoders.images import (
    ClassificationHead,
    ImageClassifier,
    ImageEncoder,
    MultiHeadImageClassifier,
)

__all__ = ["ClassificationHead", "ImageClassifier", "ImageEncoder", "MultiHeadImageClassifier"]
