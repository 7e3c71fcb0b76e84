"""How items are asked, scored and compared."""
