"""The operations that touch numbers: each checks its input, is one custom op, and picks an implementation."""
