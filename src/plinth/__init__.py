"""Plinth: a foundation model that its owner controls from the first byte to the last token."""

__version__ = "0.1.0"
