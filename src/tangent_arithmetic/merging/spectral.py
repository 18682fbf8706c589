r"""Singular vectors and polar factors of task vectors, in float64.

Which tensors the spectral methods (TSV-M, Iso-C, Iso-CTS, WUDI, STAR) treat as matrices, the others
being averaged:

==========================================  ==========================================
tensor                                      treatment
==========================================  ==========================================
matrices: weights of linear layers,         spectral
projections, positional embeddings
`*text_projection*`                         mean of the task vectors, as in TSV's code
embeddings of tokens (`TOKENS`)             mean: a row is a word, not an output
vectors, scalars, convolution kernels       mean
`exclude_keys`                              mean
==========================================  ==========================================

Zero singular values have no singular vectors here: those that LAPACK returns for them are
arbitrary, and methods that normalise the spectrum would amplify them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_arithmetic.merging.registry import Piece

if TYPE_CHECKING:
    from jaxtyping import Float

TEXT_PROJECTION = "text_projection"
# the last words of modules whose weight has a row for each token: embeddings, and output layers
TOKENS = (
    "token_embedding",
    "embed_tokens",
    "embed_in",
    "tok_embeddings",
    "embeddings",
    "word_embedding",
    "word_embeddings",
    "wte",
    "shared",
)
OUTPUTS = ("lm_head", "embed_out", "generator_lm_head", "lm_loss", "vocab_projector", "decoder")
POSITIONS = ("wpe", "relative_attention_bias")
# smallest ratio of eigenvalues of a Gram matrix that float32 results may rest on
SAFE = 1e-10


def is_spectral(piece: Piece, exclude_keys: Sequence[str] | None) -> bool:
    """Whether a whole tensor is treated as a matrix, see the table above."""
    return (
        len(piece.shape) == 2
        and piece.name not in (exclude_keys or ())
        and TEXT_PROJECTION not in piece.name
        and module_of(piece.name) not in TOKENS
    )


def module_of(name: str) -> str:
    """The last word of the module that a tensor belongs to: "wte" of "transformer.wte.weight".

    Numbers in a list of modules are none: it is "embed_tokens" of "embed_tokens.0.weight".
    """
    return re.sub(r"(\.\d+)*(\.weight)?$", "", name).rpartition(".")[2]


def has_rows_of_inputs(outline: Mapping[str, Tensor]) -> bool:
    """Whether linear layers store (inputs, outputs), as GPT-2's; its queries, keys, values tell."""
    shapes = (v.shape for name, v in outline.items() if name.endswith("attn.c_attn.weight"))
    return any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in shapes)


def mean_tau(piece: Piece, factors: Sequence[float] | None = None) -> Float[Tensor, " weights"]:
    """The mean of the task vectors, each multiplied by its factor if there are factors."""
    total = torch.zeros_like(piece.base)
    for tau, factor in zip(piece.taus(), factors or [1.0] * len(piece.thetas), strict=True):
        total.add_(tau, alpha=factor)
    return total.div_(len(piece.thetas))


def matrices(piece: Piece) -> Iterator[Float[Tensor, "m n"]]:
    """The task vectors of a matrix, one after the other, in float64."""
    for tau in piece.taus():
        yield tau.view(piece.shape).double()


def svd(
    matrix: Float[Tensor, "m n"], eps: float, rank: int | None = None, size: float = 0.0
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    r"""The thin singular value decomposition, \(A = U \operatorname{diag}(s) V^\top\).

    It rests on the eigenvectors of the smaller Gram matrix where these are as exact as `eps`, and
    on LAPACK's decomposition elsewhere.

    Args:
        matrix: A, in float64.
        eps: the relative precision of its entries. Singular values up to eps * max(m, n) times the
            largest are zero, as in `torch.linalg.matrix_rank`: they are rounding errors.
        rank: keep only this many of the largest singular values.
        size: a norm of the matrix that A is the rest of: zero is then relative to the larger one.
    """
    rank = min(matrix.shape) if rank is None else min(rank, *matrix.shape)
    short = _short_side(matrix, eps, rank, size)
    if short is None:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        least = eps * max(matrix.shape) * max(float(s[:1].sum()), size)
        rank = min(rank, int((s > least).sum()))
        return u[:, :rank], s[:rank], vt[:rank]
    vectors, s = short
    if is_wide(matrix):
        return vectors, s, (vectors.mT @ matrix) / s[:, None]
    return (matrix @ vectors) / s, s, vectors.mT


def polar(
    matrix: Float[Tensor, "m n"], eps: float
) -> tuple[Float[Tensor, "m n"], Float[Tensor, " k"]]:
    r"""The isometry nearest to a matrix, \(U V^\top\), and the singular values that are not 0.

    Of a matrix of lower rank it is the partial isometry between its row and column space.

    Args:
        matrix: the matrix, in float64.
        eps: as for `svd`.
    """
    short = _short_side(matrix, eps, min(matrix.shape), 0.0)
    if short is None:
        u, s, vt = svd(matrix, eps)
        return u @ vt, s
    vectors, s = short
    root = (vectors / s) @ vectors.mT  # the inverse root of the Gram matrix
    return root @ matrix if is_wide(matrix) else matrix @ root, s


def is_wide(matrix: Tensor) -> bool:
    """Whether a matrix has no more rows than columns."""
    return matrix.shape[0] <= matrix.shape[1]


def _short_side(
    matrix: Float[Tensor, "m n"], eps: float, rank: int, size: float
) -> tuple[Float[Tensor, "r k"], Float[Tensor, " k"]] | None:
    """The singular vectors of the shorter side and the singular values, from the Gram matrix.

    None where they are not as exact as `eps`.
    """
    if eps < torch.finfo(torch.float32).eps or not rank:
        return None
    gram = matrix @ matrix.mT if is_wide(matrix) else matrix.mT @ matrix
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    least = (eps * max(matrix.shape)) ** 2 * max(float(values[0]), size**2)
    kept = int((values > least).sum())
    if kept and values[kept - 1] < SAFE * values[0]:
        return None
    return vectors[:, :kept], values[:kept].sqrt()


def join(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Several decompositions side by side."""
    u, s, vt = zip(*parts, strict=True)
    return torch.cat(u, dim=1), torch.cat(s), torch.cat(vt)


def precision(piece: Piece) -> float:
    """The relative precision of the type in which the weights are merged."""
    return torch.finfo(piece.thetas[0].dtype).eps
