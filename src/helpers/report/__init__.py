"""Figures, tables and sentences, all made from records. Imports no torch."""
