"""Results read from records, as tables, figures and text. Imports no torch."""
