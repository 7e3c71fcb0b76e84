"""Commands, Snakemake, notebooks and clusters: what runs a study. Imports no torch."""
