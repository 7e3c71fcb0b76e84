"""Which Linears of a variant to leave float for a given share of the model's bytes.

Makes the choice that `protect: {bytes: 0.03}` in a study file makes in each quantization
(`helpers.quantization.simulation`), for one model and without a checkpoint: a look ahead, or an
`ignore` for a study that all models share. The study has to be calibrated (01_calibration).

usage: python -m tools.protect STUDY MODEL VARIANT [--bytes 0.03]
"""

import argparse
import sys

from helpers.core.errors import StudyError
from helpers.quantization import calibration
from helpers.quantization.protection import Protection, choose_protected
from helpers.quantization.simulation import choose_alphas
from helpers.runtime.devices import prepare
from helpers.sources.chat import calibration_tokens
from helpers.sources.models import load_model, load_tokenizer, model_folder
from helpers.sources.sampling import calibration_items
from helpers.study.loading import Job, open_job
from helpers.study.schema import Protect

SHARE = 0.03


def choice_of(job: Job, share: float) -> Protection:
    """The choice for a job's variant, whatever it protects itself.

    Raises:
        StudyError: the study is not calibrated, or the variant quantizes nothing.
    """
    if not job.recipe.quantized:
        raise StudyError(f"variants.{job.variant} quantizes nothing; name one that does")
    if job.recipe.made_elsewhere:
        raise StudyError(f"variants.{job.variant} was made elsewhere; name one made here")
    path = job.paths.calibration(job.model) / "activations.safetensors"
    absmax, fit_absmax = calibration.load_absmax(path), calibration.load_absmax(path, fit=True)
    source = model_folder(job.study, job.model, job.paths)
    model = load_model(source, job.study.runtime)
    tokenizer = load_tokenizer(source, enable_thinking=job.study.enable_thinking)
    adapter = job.calibration_settings.adapter
    items = calibration_items(job.study, job.calibration)
    tokens = [calibration_tokens(tokenizer, item, adapter) for item in items]
    chosen = choose_alphas(model, job.recipe, fit_absmax, calibration.judging(tokens))
    recipe = chosen.recipe.model_copy(update={"protect": Protect(bytes=share)})
    return choose_protected(model, recipe, absmax, chosen.alphas, tokens, seed=job.study.seed)


def main(argv: list[str] | None = None) -> int:
    """Print the choice for one variant."""
    parser = argparse.ArgumentParser(prog="make protect", description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("model")
    parser.add_argument("variant")
    parser.add_argument("--bytes", type=float, default=SHARE, help=f"share of all bytes ({SHARE})")
    arguments = parser.parse_args(argv)
    try:
        job = prepare(open_job(arguments.study, model=arguments.model, variant=arguments.variant))
        if not 0 < arguments.bytes < 1:
            raise StudyError(f"--bytes = {arguments.bytes:g} is no share; give one between 0 and 1")
        choice = choice_of(job, arguments.bytes)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    print(choice.sentence)
    print(f"ignore: [{', '.join(choice.recipe.ignore)}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
