"""select: which query block reads which rows. Every function returns Layouts."""

from farfield.select.algebra import from_block_mask, from_dense, minus, to_block_mask, to_dense, transpose, union
from farfield.select.static import Multipole, full, multipole, powers, sharded, strided, window
from farfield.select.tree import tree

__all__ = [
    "Multipole",
    "from_block_mask",
    "from_dense",
    "full",
    "minus",
    "multipole",
    "powers",
    "sharded",
    "strided",
    "to_block_mask",
    "to_dense",
    "transpose",
    "tree",
    "union",
    "window",
]
