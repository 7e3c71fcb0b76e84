"""`make bench`: the study's own paths side by side with those that others use for the same.

A module for each comparison; `turns` measures, `agreement` says whether the answers are the
same, `table` writes the account. Ratios hold from machine to machine better than seconds.
"""
