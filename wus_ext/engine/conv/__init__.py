"""Convolutions on weights prepared beforehand."""
