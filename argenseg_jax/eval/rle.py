"""Masks as COCO's compressed run lengths, the form of every saved prediction (data/rle.py)."""

from __future__ import annotations

from argenseg_jax.data.rle import checked_rle, decode_rle, encode_rle

__all__ = ["checked_rle", "decode_rle", "encode_rle"]
