"""Counted n-grams: tables, their storage, look-ups and counting."""
