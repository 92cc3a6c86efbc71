"""farfield: long-context attention. A query block reads some rows, and one softmax decides."""

from farfield import mechanisms, select
from farfield.attention import attention
from farfield.mechanisms.fma import FMA
from farfield.ops.attend import attend
from farfield.ops.merge import merge
from farfield.ops.scan import scan
from farfield.summarize import summarize
from farfield.types import Layout, Partial, Rows

__version__ = "0.1.0"
__all__ = [
    "FMA",
    "Layout",
    "Partial",
    "Rows",
    "attend",
    "attention",
    "mechanisms",
    "merge",
    "scan",
    "select",
    "summarize",
]
