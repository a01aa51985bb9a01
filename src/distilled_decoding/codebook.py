"""The codebook: from tokens to their codes and back to the nearest token.

Axis letters: B batch, L tokens in a sequence, N rows (B x L), V codebook entries, C code channels.
"""

import torch
from torch import Tensor


def lookup(token_BL: Tensor, codebook_VC: Tensor) -> Tensor:
    """Return the code of each token.

    Args:
        token_BL: int64, any shape.
        codebook_VC: the codes, [V, C].

    Returns:
        code_BLC, the shape of `token_BL` with C channels behind.
    """
    return codebook_VC[token_BL]


def nearest(code_BLC: Tensor, codebook_VC: Tensor, chunk: int = 1024) -> Tensor:
    """Return the token whose code is nearest in Euclidean distance; the lowest one of equals.

    The rows are taken `chunk` at a time, so that memory is chunk x V however long the input is.

    Args:
        code_BLC: vectors, any shape with C channels last.
        codebook_VC: the codes, [V, C].
        chunk: rows compared at once, at least 1.

    Returns:
        token_BL, int64, the shape of `code_BLC` without its channels.

    Raises:
        ValueError: when the channels of the two differ.
    """
    if code_BLC.shape[-1] != codebook_VC.shape[-1]:
        raise ValueError(
            f"codes have {code_BLC.shape[-1]} channels but the codebook has {codebook_VC.shape[-1]}; "
            "put the channels last"
        )
    book_VC = codebook_VC.float()
    # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), and |x|^2 is the same for all codes.
    offset_V = book_VC.square().sum(-1) / -2
    rows_NC = code_BLC.reshape(-1, code_BLC.shape[-1]).float()
    chunks = [torch.addmm(offset_V, part_NC, book_VC.T).argmax(-1) for part_NC in rows_NC.split(chunk)]
    return torch.cat(chunks).view(code_BLC.shape[:-1])
