"""A variant as a recipe file of llmcompressor, which its `oneshot` reads.

Prints SmoothQuantModifier and QuantizationModifier or GPTQModifier with the variant's settings. An
α that was chosen is the chosen one, read from the study's results, as are the Linears that
`protect` left float. llmcompressor computes smoothing scales from max − min of a channel instead of
max|X| (NOTES.md), so that its checkpoint differs from the study's by as much; without smoothing the
weights are the same.

usage: python -m tools.recipe STUDY MODEL VARIANT > recipe.yaml
"""

import argparse
import re
import sys
from collections.abc import Iterable

import yaml

from helpers.core.errors import StudyError
from helpers.core.records import read_json
from helpers.quantization.calibration import SmoothingGroup, smoothing_groups
from helpers.quantization.variants import GPTQ, compression_scheme, describe_recipe
from helpers.runtime.discovery import architecture, linear_names
from helpers.sources.model_files import load_config
from helpers.sources.models import model_folder
from helpers.study.loading import PROTECTED, Job, open_job
from helpers.study.schema import PATTERN_MARK, is_ignored


def recipe_of(job: Job) -> dict:
    """The recipe as llmcompressor's file holds it.

    Raises:
        StudyError: no recipe of llmcompressor makes this variant, or its α is not chosen yet.
    """
    variant, at = job.recipe, f"variants.{job.variant}"
    if variant.recipe or variant.made_elsewhere or not variant.quantized:
        kind = "broken on purpose" if variant.recipe else "float"
        kind = "made elsewhere" if variant.made_elsewhere else kind
        raise StudyError(
            f"{at}: is {kind}, and llmcompressor has no recipe for it; name a quantized variant"
        )
    config = load_config(model_folder(job.study, job.model, job.paths))
    modifiers = {}
    if variant.smooth:
        groups = smoothing_groups(config, job.claim.smooth.targets)
        modifiers["SmoothQuantModifier"] = {
            "smoothing_strength": _strength(job),
            "mappings": _mappings(groups, architecture(config).blocks),
        }
    linears = linear_names(config)
    quantizer = {
        "config_groups": {"group_0": compression_scheme(variant)},
        "ignore": [name for name in linears if is_ignored(name, job.claim.ignore)],
    }
    if variant.rounding == "gptq":
        modifiers["GPTQModifier"] = quantizer | GPTQ
    else:
        modifiers["QuantizationModifier"] = quantizer
    return {"quant_stage": {"quant_modifiers": modifiers}}


def _strength(job: Job) -> float:
    """The one α of all groups: the declared one, or the one that was chosen."""
    declared = job.recipe.smooth.alpha
    if isinstance(declared, float):
        return declared
    path = job.paths.quantization(job.model, job.variant) / "alpha.json"
    chosen = set(read_json(path, made_by="02_quantization")["alphas"].values())
    if len(chosen) != 1:
        raise StudyError(
            f"variants.{job.variant}.smooth.alpha: chose {len(chosen)} values for its groups, and "
            "llmcompressor's SmoothQuantModifier has one; give a list of values or a number"
        )
    return chosen.pop()


def _protected(job: Job) -> dict:
    """The record of the Linears that `protect` chose; empty without."""
    if job.recipe.protect is None:
        return {}
    path = job.paths.quantization(job.model, job.variant) / PROTECTED
    return read_json(path, made_by="02_quantization")


def _mappings(groups: Iterable[SmoothingGroup], blocks: str) -> list:
    """[[patterns of the Linears that read, pattern of what they read from], …], block by block."""
    mappings = []
    for group in groups:
        readers = [_pattern(name, blocks) for name in group.consumers]
        mapping = [list(dict.fromkeys(readers)), _pattern(group.producer, blocks)]
        if mapping not in mappings:
            mappings.append(mapping)
    return mappings


def _pattern(name: str, blocks: str) -> str:
    """A pattern that matches a module in every block; numbers of experts are left open too."""
    inside = re.sub(rf"^{re.escape(blocks)}\.\d+\.", "", name)
    return PATTERN_MARK + ".*" + re.sub(r"\.\d+\.", r".\\d+.", inside).replace(".", r"\.") + "$"


def text_of(job: Job) -> str:
    """The recipe file's text, with the variant in a comment above it."""
    body = yaml.safe_dump(recipe_of(job), sort_keys=False, allow_unicode=True)
    alphas = {"all": _strength(job)} if job.recipe.smooth else {}
    smooth = job.claim.smooth if job.recipe.smooth else None
    words = describe_recipe(job.recipe, alphas, _protected(job), smooth=smooth)
    settings = job.calibration_settings
    return (
        f"# {job.variant} of {job.model} in the study {job.name}: {words}.\n"
        f"# The study calibrates on {settings.items} items of at most {settings.max_tokens} tokens "
        f"({settings.adapter}).\n{body}"
    )


def main(argv: list[str] | None = None) -> int:
    """Print the recipe; 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m tools.recipe", description=__doc__)
    for name in ("study", "model", "variant"):
        parser.add_argument(name)
    given = parser.parse_args(argv)
    try:
        print(text_of(open_job(given.study, model=given.model, variant=given.variant)), end="")
    except StudyError as error:
        print(f"make: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
