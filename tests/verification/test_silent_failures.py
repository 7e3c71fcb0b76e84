"""The bank of silent failures: each breaks one thing in a sound run and names who catches it.

None of them raises, logs or crashes by itself: without its gate, each ends in a table as
a finding about SmoothQuant. A bug in the code stays in place while the run is verified,
as it would in life. Failures of the evaluation are in another bank.
"""

import copy
from dataclasses import replace
from functools import partial

import llmcompressor.modifiers.gptq.base as gptq
import pytest
import torch

import quantized_run
from helpers.quantization import (
    calibration,
    int8_linear,
    int8_matmul,
    protection,
    simulation,
    smoothing,
    variants,
)
from helpers.sources import chat, sampling
from helpers.study.schema import Variant
from helpers.verification import variant_gates
from quantized_run import VARIANTS

SMOOTHING = "smoothing scales as declared"
FUNCTION = "smoothing preserves the logits"
GRID = "weights on the declared grid"
FLOAT = "smoothed float weights"
STATIC = "static scales from the calibration"
KEPT = "all other tensors unchanged"
CENSUS = "quantized layers as declared"
METADATA = "metadata match the tensors"
ACTIVATIONS = "int8 activations at run time"
KERNEL = "int8 layers match the reference"
RELOAD = "reloaded logits identical"
SOURCE = "source model unchanged"
ITEMS = "calibration items as declared"
LEAK = "no calibration leakage"
STATISTICS = "calibration maxima recomputed"
CHOICE = "alpha minimizes the loss"
TOKENIZER = "tokenizer matches the source"
GPTQ = "weights rounded by GPTQ"
PROTECTED = "protected Linears as chosen"
SENSITIVITY = "recorded sensitivity recomputed"

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
BANK = []


def failure(
    *gates: str,
    variant: str = "smoothquant_w8a8",
    kind: str = "checkpoint",
    at: str = "",
    words: str = "{break_}",
    long: bool = False,
):
    """Enter a way to break a run, the gates that must catch it, and the variant it is tried on.

    Args:
        kind, at, words: of the bank's table; where no code is patched, `at` names a file.
        long: a quicker member shows that each of the gates works.
    """

    def enter(break_):
        marks = [pytest.mark.bank(kind, words, at=at), *([pytest.mark.long] if long else [])]
        entry = pytest.param(break_, set(gates), variant, id=break_.__name__, marks=marks)
        BANK.append(entry)
        return break_

    return enter


# What is saved beside the weights


def saved_tokenizer(run, edit) -> None:
    """The checkpoint's tokenizer.json, changed in place by `edit`."""
    with run.edited_json(run.checkpoint / "tokenizer.json") as data:
        edit(data)


@failure(
    TOKENIZER,
    kind="tokens",
    at="tokenizer.json",
    words="a wrong tokenizer saved with the checkpoint",
)
def two_tokens_exchanged_in_the_saved_tokenizer(run, _):
    def exchange(data):
        vocabulary = data["model"]["vocab"]
        one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    saved_tokenizer(run, exchange)


@failure(TOKENIZER, kind="tokens", at="tokenizer.json")
def a_saved_tokenizer_that_folds_capitals(run, _):
    saved_tokenizer(run, lambda data: data.update(normalizer={"type": "Lowercase"}))


@failure(TOKENIZER, kind="tokens", at="tokenizer_config.json")
def another_end_of_text_saved_with_the_tokenizer(run, _):
    with run.edited_json(run.checkpoint / "tokenizer_config.json") as data:
        data["eos_token"] = "<|im_start|>"


@failure(TOKENIZER, kind="tokens", at="chat_template.jinja")
def another_chat_format_saved_with_the_tokenizer(run, _):
    path = run.checkpoint / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace("assistant", "helper").replace("\\n", " "))


# Smoothing


@failure(GRID, FUNCTION)
def weights_divided_instead_of_multiplied(run, patch):
    def fold(producer, consumers, scales, **_):
        with torch.no_grad():
            producer.weight.div_(scales)
            for consumer in consumers:
                consumer.weight.div_(scales)

    patch.setattr(smoothing, "fold_scales_", fold)
    run.quantize()


@failure(FLOAT, FUNCTION, variant="smooth_only")
def weights_divided_in_a_float_variant(run, patch):
    weights_divided_instead_of_multiplied(run, patch)


@failure(SMOOTHING)
def smoothing_skipped_without_a_word(run, patch):
    patch.setattr(smoothing, "smooth_", lambda *_: [])
    run.quantize()


@failure(CHOICE, variant="w8a8_grid")
def the_worst_alpha_of_a_grid(run, patch):
    """The checkpoint is what it says it is; only the choice was the wrong way round."""
    patch.setattr(
        simulation, "_choice_of_least_loss", lambda losses, of: max(losses, key=losses.get)
    )
    run.quantize()


@failure(CHOICE, variant="o3_auto")
def the_worst_alpha_of_every_group(run, patch):
    the_worst_alpha_of_a_grid(run, patch)


@failure(CHOICE, variant="w8a8_grid")
def a_grid_that_was_not_tried_to_its_end(run, patch):
    true = simulation._grid_curve
    patch.setattr(simulation, "_grid_curve", lambda *arguments: true(*arguments)[:1])
    run.quantize()


@failure(SMOOTHING)
def smoothing_applied_twice(run, patch):
    once = smoothing.fold_scales_

    def twice(*args, **options):
        once(*args, **options)
        once(*args, **options)

    patch.setattr(smoothing, "fold_scales_", twice)
    run.quantize()


@failure(SMOOTHING, FUNCTION)
def the_wrong_norm_folded(run, patch):
    real = smoothing.smoothing_groups

    def swapped(config, targets):
        groups = real(config, targets)
        producers = [group.producer for group in groups]
        producers[0], producers[1] = producers[1], producers[0]
        return [replace(g, producer=p) for g, p in zip(groups, producers, strict=True)]

    patch.setattr(smoothing, "smoothing_groups", swapped)
    run.quantize()


@failure(SMOOTHING, FUNCTION, at="model.safetensors")
def norms_left_undivided(run, _):
    with run.edited() as saved, run.edited(run.root / "source") as source:
        saved["model.layers.1.input_layernorm.weight"] = source[
            "model.layers.1.input_layernorm.weight"
        ]


@failure(SMOOTHING, FUNCTION, at="model.safetensors")
def norms_swapped_between_two_layers(run, _):
    a, b = (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))
    with run.edited() as saved:
        saved[a], saved[b] = saved[b], saved[a]


@failure(SMOOTHING, at="the variant's recipe")
def alpha_other_than_declared(run, patch):
    recipe = {"preset": "w8a8", "smooth": {"alpha": 0.55, "targets": quantized_run.NORMS}}
    with patch.context() as other:
        other.setitem(VARIANTS, run.variant, recipe)
        run.quantize()


@failure(SMOOTHING)
def weight_maxima_off_by_a_tenth(run, patch):
    real = smoothing.smoothing_scales
    patch.setattr(smoothing, "smoothing_scales", lambda a, w, alpha: real(a, w * 0.9, alpha=alpha))
    run.quantize()


# Weights


@failure(GRID, at="model.safetensors")
def per_tensor_weights_labelled_per_channel(run, _):
    with run.edited() as saved:
        weight = saved[f"{Q0}.weight"] * saved[f"{Q0}.weight_scale"]
        step = weight.abs().max() / 127.5
        saved[f"{Q0}.weight"] = (weight / step).round().clamp(-128, 127).to(torch.int8)
        saved[f"{Q0}.weight_scale"] = step.expand_as(saved[f"{Q0}.weight_scale"]).clone()


@failure(GRID, METADATA, at="model.safetensors")
def four_bit_weights_labelled_eight(run, _):
    with run.edited() as saved:
        for key in [k for k in saved if k.endswith(".weight_scale")]:
            name = key.removesuffix("_scale")
            saved[name] = (saved[name] / 17.0).round().clamp(-8, 7).to(torch.int8)
            saved[key] = saved[key] * 17.0


@failure(GRID, at="model.safetensors")
def weight_scales_swapped_between_two_layers(run, _):
    with run.edited() as saved:
        a, b = f"{Q0}.weight_scale", f"{Q1}.weight_scale"
        saved[a], saved[b] = saved[b], saved[a]


@failure(GRID, variant="o1", at="model.safetensors")
def weight_scales_of_q_and_k_swapped_in_one_layer(run, _):
    with run.edited() as saved:
        a, b = f"{Q0}.weight_scale", f"{Q0.replace('q_proj', 'k_proj')}.weight_scale"
        saved[a], saved[b] = saved[b], saved[a]


@failure(GRID, RELOAD, at="model.safetensors")
def a_nan_in_a_saved_scale(run, _):
    with run.edited() as saved:
        saved[f"{Q0}.weight_scale"][3] = float("nan")


@failure(GRID, FUNCTION, at="model.safetensors")
def zero_weights_in_one_linear(run, _):
    with run.edited() as saved:
        saved["model.layers.1.mlp.down_proj.weight"].zero_()


@failure(GRID, FUNCTION, at="model.safetensors")
def one_row_of_one_linear_negated(run, _):
    with run.edited() as saved:
        row = saved["model.layers.1.mlp.up_proj.weight"][5]
        row.copy_((-row.int()).clamp(-128, 127).to(torch.int8))


@failure(
    GRID,
    FUNCTION,
    GPTQ,
    variant="gptq_w8a8",
    at="llmcompressor.modifiers.gptq",
    words="columns left in the order in which GPTQ visits them",
)
def columns_left_in_the_order_that_gptq_visits_them(run, patch):
    real = gptq.quantize_weight

    def permuted(*, weights, hessians, **options):
        order = hessians.diagonal(dim1=-2, dim2=-1).argsort(descending=True)
        quantized, *others = real(weights=weights, hessians=hessians, **options)
        return quantized.gather(-1, order[:, None].expand_as(quantized)), *others

    patch.setattr(gptq, "quantize_weight", permuted)
    run.quantize()


@failure(
    GPTQ,
    variant="gptq_w8a8",
    at="the variant's recipe",
    words="weights rounded to nearest instead of by GPTQ",
)
def weights_rounded_to_nearest_instead_of_by_gptq(run, patch):
    with patch.context() as other:
        other.setitem(VARIANTS, run.variant, VARIANTS[run.variant] | {"rounding": "nearest"})
        run.quantize()


@failure(
    GPTQ,
    variant="gptq_w8a8",
    at="the texts that GPTQ reads",
    words="GPTQ on other texts than the calibration's",
    long=True,
)
def gptq_on_other_texts_than_the_calibrations(run, patch):
    real = quantized_run.calibration_tokens
    patch.setattr(quantized_run, "calibration_tokens", lambda *args: real(*args)[::-1])
    run.quantize()


@failure(GPTQ, variant="gptq_w8a8", words="padding counted in GPTQ's Hessians", long=True)
def padding_counted_in_gptqs_hessians(run, patch):
    real = variants.pad

    def unmasked(rows, **options):
        padded = real(rows, **options)
        return torch.ones_like(padded) if rows[0][0] == 1 else padded

    patch.setattr(variants, "pad", unmasked)
    run.quantize()


@failure(
    GRID,
    FUNCTION,
    variant="gptq_w8a8",
    words="GPTQ before the weights are multiplied by the scales",
    long=True,
)
def gptq_before_the_weights_are_multiplied_by_the_scales(run, patch):
    real = variants.quantize_

    def unsmoothed(model, variant, absmax, items, **options):
        with run.edited(run.root / "source") as source, torch.no_grad():
            for name, linear in calibration.quantized_linears(model, variant.ignore).items():
                linear.weight.copy_(source[f"{name}.weight"])
        return real(model, variant, absmax, items, **options)

    patch.setattr(variants, "quantize_", unsmoothed)
    run.quantize()


@failure(GRID, variant="rtn_w8a8", long=True, at="the variant's recipe")
def a_clipped_grid_in_a_variant_that_declares_the_whole_one(run, patch):
    with patch.context() as other:
        other.setitem(VARIANTS, run.variant, {"preset": "w8a8", "rounding": "mse"})
        run.quantize()


@failure(GRID, variant="mse_w8a8", long=True)
def a_grid_clipped_to_a_half(run, patch):
    """Every weight is right for the step that is stored with it, or at the end of its grid."""
    real = variants.compression_scheme

    def clipped(variant, widths):
        scheme = real(variant, widths)
        scheme["weights"]["observer_kwargs"] = {"expand": 1.0, "maxshrink": 0.5, "norm": 0.01}
        return scheme

    patch.setattr(variants, "compression_scheme", clipped)
    run.quantize()


@failure(CENSUS, METADATA, KEPT, variant="down_float", long=True)
def a_protected_linear_quantized_after_all(run, patch):
    real = variants.quantized_linears
    patch.setattr(variants, "quantized_linears", lambda model, _: real(model, ("lm_head",)))
    run.quantize()


# Linears that are chosen to stay float


@failure(CENSUS, METADATA, KEPT, PROTECTED, variant="protected")
def a_chosen_linear_quantized_after_all(run, patch):
    real = variants.quantized_linears
    patch.setattr(variants, "quantized_linears", lambda model, _: real(model, ("lm_head",)))
    run.quantize()


@failure(PROTECTED, variant="protected")
def a_choice_of_more_bytes_than_allowed(run, patch):
    real = protection.best_set
    patch.setattr(protection, "best_set", lambda gains, costs, most: real(gains, costs, 2 * most))
    run.quantize()


@failure(PROTECTED, variant="protected")
def linears_sorted_by_what_they_gain_a_byte(run, patch):
    """The most gain a byte first: what is left of the bytes then fits nothing that counts."""

    def greedy(gains, costs, budget):
        chosen = []
        for name in sorted(gains, key=lambda n: -gains[n] / costs[n]):
            if costs[name] <= budget:
                chosen.append(name)
                budget -= costs[name]
        return chosen

    patch.setattr(protection, "best_set", greedy)
    run.quantize()


@failure(PROTECTED, variant="protected", kind="calibration")
def linears_chosen_on_items_that_smoothing_was_fitted_to(run, patch):
    patch.setattr(protection, "first_judging_item", lambda _: 2)
    run.quantize()


def judged_by(patch, measure) -> None:
    """The sensitivities are what `measure` makes of the measurement, its owner and the texts."""
    real = protection._Protecting.sensitivities
    patch.setattr(
        protection._Protecting,
        "sensitivities",
        lambda own, texts: measure(partial(real, own), own, texts),
    )


@failure(SENSITIVITY, variant="protected", kind="calibration")
def linears_chosen_on_texts_that_are_no_calibration_items(run, patch):
    unread = [list(range(5, 60))]
    judged_by(patch, lambda real, _own, texts: real(unread * len(texts)))
    run.quantize()


@failure(SENSITIVITY, variant="protected")
def linears_chosen_by_their_weights_alone(run, patch):
    real = simulation.fake_quantize
    with patch.context() as other:
        other.setattr(
            simulation.SmoothedLinear,
            "rounded",
            lambda own, _: own.x @ real(own.weight, own.weight.abs().amax(1, keepdim=True)).T,
        )
        run.quantize()


@failure(SENSITIVITY, variant="protected")
def the_kl_of_another_choice(run, patch):
    real = protection._Protecting.kl
    patch.setattr(protection._Protecting, "kl", lambda own, probe, _: real(own, probe, []))
    run.quantize()


def optional_targets_on_record(run):
    """The record, and whether scales were folded into the optional targets."""
    return run.edited_json(run.checkpoint.parent / "quantization" / "alpha.json")


@failure(CHOICE, variant="o3_optional")
def the_worse_targets_of_a_grid(run, patch):
    the_worst_alpha_of_a_grid(run, patch)


@failure(CHOICE, variant="o3_optional")
def optional_targets_that_were_not_tried(run, patch):
    true = simulation._grid_curve
    patch.setattr(simulation, "_grid_curve", lambda *arguments: true(*arguments)[:2])
    run.quantize()


@failure(CHOICE, GRID, FUNCTION, variant="o3_optional", at="alpha.json")
def other_targets_on_record_than_were_smoothed(run, _):
    with optional_targets_on_record(run) as record:
        down = record["targets"] == [*quantized_run.NORMS, "mlp_down"]
        record["targets"] = [*quantized_run.NORMS, *([] if down else ["mlp_down"])]
        down_alphas = {f"model.layers.{i}.mlp.down_proj": 0.3 for i in range(2)}
        record["alphas"] = {n: a for n, a in record["alphas"].items() if "down" not in n} | (
            {} if down else down_alphas
        )


def recorded_choice(run):
    return run.edited_json(run.checkpoint.parent / "quantization" / "protected.json")


@failure(PROTECTED, variant="protected", kind="report", at="protected.json")
def a_better_rank_than_the_choice_has(run, _):
    with recorded_choice(run) as record:
        record["random"][3]["kl"] = record["kl_chosen"]
        record["rank"] = 1


@failure(PROTECTED, variant="protected", kind="report", at="protected.json")
def random_choices_of_fewer_bytes(run, _):
    with recorded_choice(run) as record:
        record["random"][0]["chosen"].pop()


@failure(PROTECTED, variant="protected", kind="calibration", at="protected.json")
def a_choice_compared_on_the_items_that_made_it(run, _):
    with recorded_choice(run) as record:
        record["other_items"] = record["judging_items"]


@failure(CENSUS, PROTECTED, variant="protected", at="protected.json")
def another_linear_on_record_than_is_float(run, _):
    with recorded_choice(run) as record:
        record["chosen"][0] = "model.layers.1.mlp.down_proj"


@failure(CENSUS, METADATA)
def one_linear_left_out(run, patch):
    real = variants.quantized_linears

    def fewer(model, ignore):
        return {n: m for n, m in real(model, ignore).items() if n != Q1}

    patch.setattr(variants, "quantized_linears", fewer)
    run.quantize()


@failure(KEPT, kind="tied", at="model.safetensors")
def tied_embeddings_altered(run, _):
    with run.edited() as saved:
        saved["model.embed_tokens.weight"].mul_(1.001)


@failure(KEPT, kind="tied", at="model.safetensors")
def a_head_of_its_own_beside_tied_embeddings(run, _):
    with run.edited() as saved:
        saved["lm_head.weight"] = saved["model.embed_tokens.weight"].round(decimals=2)


@failure(KEPT, FUNCTION, at="model.safetensors")
def a_norm_nobody_should_fold_altered(run, _):
    with run.edited() as saved:
        saved["model.norm.weight"].mul_(1.01)


@failure(KEPT, variant="rtn_w8a8", at="the variant's recipe")
def smoothing_in_a_variant_without(run, patch):
    smooth = {"preset": "w8a8", "smooth": quantized_run.SMOOTH}
    with patch.context() as other:
        other.setitem(VARIANTS, run.variant, smooth)
        run.quantize()


@failure(METADATA, at="config.json")
def a_config_that_forgets_the_kept_head(run, _):
    with run.edited_json(run.checkpoint / "config.json") as config:
        config["quantization_config"]["ignore"] = []


@failure(METADATA, ACTIVATIONS, at="config.json")
def a_config_of_another_granularity(run, _):
    with run.edited_json(run.checkpoint / "config.json") as config:
        (group,) = config["quantization_config"]["config_groups"].values()
        group["input_activations"]["strategy"] = "tensor"


# Run time


@failure(ACTIVATIONS, KERNEL, kind="int8")
def activations_left_float_at_run_time(_, patch):
    def forward(self, x):
        weight = self.weight_t.float() * self.weight_scale
        return x @ weight.to(x.dtype)

    patch.setattr(int8_linear.Int8Linear, "forward", forward)


@failure(ACTIVATIONS, KERNEL, kind="int8")
def one_scale_for_all_tokens_at_run_time(_, patch):
    def one_scale(self, x):
        rows = x.reshape(-1, self.in_features).float()
        scale = int8_linear.absmax_scale(rows.abs().amax().reshape(1))
        return int8_linear.quantize_activations(rows, scale), scale

    patch.setattr(int8_linear.Int8Linear, "_quantize", one_scale)


@failure(ACTIVATIONS, KERNEL, kind="int8")
def activations_cut_off_instead_of_rounded(_, patch):
    def floor(x, scale):
        return torch.div(x, scale).trunc_().clamp_(-128, 127).to(torch.int8)

    def cut_off(x):
        scale = int8_linear.absmax_scale(x.abs().amax(-1, keepdim=True))
        return floor(x, scale), scale

    patch.setattr(int8_linear, "quantize_activations", floor)
    patch.setattr(int8_matmul, "quantize_rows_cpu", cut_off)


@failure(RELOAD, kind="int8")
def another_answer_at_every_load(_, patch):
    real = int8_linear.Int8Linear.__init__

    def shaken(self, weight, weight_scale, *args, **options):
        noise = 1 + 1e-3 * torch.rand(1)
        real(self, weight, weight_scale * noise, *args, **options)

    patch.setattr(int8_linear.Int8Linear, "__init__", shaken)


@failure(STATIC, variant="o3", at="model.safetensors")
def a_static_scale_from_the_wrong_layer(run, _):
    with run.edited() as saved:
        a, b = f"{Q0}.input_scale", f"{Q1}.input_scale"
        saved[a], saved[b] = saved[b], saved[a]


@failure(STATIC, variant="o3")
def static_scales_from_before_smoothing(run, patch):
    patch.setattr(variants, "smoothed_absmax", lambda absmax, _done: absmax)
    run.quantize()


@failure(STATIC, variant="o3", long=True)
def static_scales_of_another_calibration(run, patch):
    """The smoothing is this calibration's; the scales come from half of its items."""
    settings, absmax = run.settings, calibration.load_absmax
    run.settings = copy.deepcopy(settings)
    run.settings["calibration"]["items"] //= 2
    other = run.copy(run.root / "other")
    other.settings = run.settings
    other.calibrate()
    run.settings = settings
    maxima = absmax(other.calibration / "activations.safetensors")
    real = variants.smoothed_absmax
    patch.setattr(variants, "smoothed_absmax", lambda _, smoothed: real(maxima, smoothed))
    run.quantize()


@failure(SMOOTHING, variant="of_few", kind="calibration")
def scales_of_another_calibration(run, patch):
    """The variant names three items; its scales come from the study's own calibration."""
    own = run.copy(run.root / "own")
    own.variant = "smoothquant_w8a8"
    own.calibrate()
    maxima = calibration.load_absmax(own.calibration / "activations.safetensors")
    patch.setattr(calibration, "load_absmax", lambda *_, **__: maxima)
    run.quantize()


@failure(ITEMS, variant="of_few", kind="calibration", at="the folder of a calibration")
def the_study_s_own_calibration_in_place_of_the_named_one(run, _):
    own = run.copy(run.root / "own")
    own.variant = "smoothquant_w8a8"
    own.calibrate()
    for file in own.calibration.iterdir():
        (run.calibration / file.name).write_bytes(file.read_bytes())
    run.quantize()


# Source and calibration


@failure(SOURCE, kind="calibration", at="the source's model.safetensors")
def the_source_model_edited_in_place(run, _):
    with run.edited(run.root / "source") as source:
        source[f"{Q0}.weight"][0, 0] += 1e-3


@failure(SOURCE, kind="calibration", at="the source's model.safetensors")
def the_source_model_changed_after_calibration(run, _):
    with run.edited(run.root / "source") as source:
        source[f"{Q0}.weight"][0, 0] += 1e-3
    run.quantize()


@failure(ITEMS, kind="calibration")
def calibration_polluted_by_padding(run, patch):
    """Padding that is quieter than the text changes no maximum, but it is counted."""
    real = calibration._input_hooks

    def unmasked(model, mask, owners, fit, statistics):
        everything = torch.ones_like(mask)
        owners = torch.zeros(mask.numel(), dtype=torch.long)
        return real(model, everything, owners, owners == 0, statistics)

    patch.setattr(calibration, "_input_hooks", unmasked)
    run.calibrate()
    run.quantize()


@failure(STATISTICS, ITEMS, kind="calibration", at="the source's model.safetensors")
def calibration_polluted_by_loud_padding(run, patch):
    with run.edited(run.root / "source") as source:
        source["model.embed_tokens.weight"][0] = torch.eye(64)[7]  # all in one channel
    calibration_polluted_by_padding(run, patch)


@failure(STATISTICS, kind="calibration", at="activations.safetensors")
def calibration_maxima_of_another_layer(run, _):
    with run.edited(run.calibration, "activations.safetensors") as tensors:
        for name in ("q_proj", "k_proj", "v_proj"):
            a, b = (f"model.layers.{i}.self_attn.{name}.absmax" for i in (0, 1))
            tensors[a], tensors[b] = tensors[b], tensors[a]
    run.quantize()


def calibrated_with_louder_norms(run) -> dict:
    """Calibrate a model that differs in one norm; return the files of the right one."""
    files = [run.root / "source" / "model.safetensors", run.calibration / "record.json"]
    kept = {path: path.read_bytes() for path in files}
    with run.edited(run.root / "source") as source:
        source["model.layers.0.input_layernorm.weight"].mul_(1.05)
    run.calibrate()
    return kept


@failure(STATISTICS, kind="calibration", at="the source's model.safetensors")
def maxima_of_the_other_model_of_the_study(run, _):
    for path, content in calibrated_with_louder_norms(run).items():
        path.write_bytes(content)
    run.quantize()


@failure(STATISTICS, SOURCE, kind="calibration", at="the source's model.safetensors")
def the_whole_calibration_of_the_other_model(run, _):
    model, _record = calibrated_with_louder_norms(run).items()
    model[0].write_bytes(model[1])
    run.quantize()


@failure(LEAK, kind="calibration")
def calibration_overlapping_evaluation(run, patch):
    run.settings = copy.deepcopy(run.settings)
    run.settings["evaluation"]["datasets"]["openmath"] = {
        "adapter": "openmath",
        "source": {"shipped": "openmath_train"},
        "items": 6,
        "ask": {
            "protocol": "generate",
            "answer": "boxed",
            "stop": "answer",
            "shots": 0,
            "max_new_tokens": 4,
        },
    }
    patch.setattr(sampling, "_evaluation_keys", lambda *_: set())
    run.calibrate()
    run.quantize()


@failure(ITEMS, STATISTICS, kind="calibration", at="the number of calibration items")
def calibration_with_fewer_items(run, _):
    asked = run.settings
    run.settings = copy.deepcopy(asked)
    run.settings["calibration"]["items"] = 3
    run.calibrate()
    run.settings = asked
    run.quantize()


@failure(ITEMS, kind="calibration", at="tokens of the calibration")
def calibration_items_cut_short(run, patch):
    real = quantized_run.calibration_tokens
    patch.setattr(quantized_run, "calibration_tokens", lambda *args: real(*args)[:60])
    run.calibrate()
    run.quantize()


@failure(ITEMS, kind="calibration")
def calibration_texts_cut_short_wherever_they_are_made(run, patch):
    """The check reads as many tokens as the calibration, if it makes them in the same way."""
    true = chat.tokenize
    patch.setattr(chat, "tokenize", lambda *args: true(*args)[:60])
    run.calibrate()
    run.quantize()


@failure(ITEMS, kind="calibration")
def calibration_texts_without_the_turn_of_the_answer(run, patch):
    def render(tokenizer, messages):
        return tokenizer.apply_chat_template(messages, tokenize=False)

    patch.setattr(chat, "render", render)
    run.calibrate()
    run.quantize()


# The tests


def on_both_families() -> list:
    """Every member on both families, the quick tests with one of them in turn."""
    members = []
    for place, entry in enumerate(BANK):
        for other, family in enumerate(("llama", "qwen3")):
            marks = [*entry.marks, *([pytest.mark.long] if (place + other) % 2 else [])]
            members.append(
                pytest.param(family, *entry.values, id=f"{family}-{entry.id}", marks=marks)
            )
    return members


@pytest.mark.parametrize(
    ("family", "break_", "expected", "variant"), on_both_families(), indirect=["family"]
)
def test_is_caught_by_name(sound_run, family, monkeypatch, break_, expected, variant):
    run = sound_run(family, variant)
    break_(run, monkeypatch)
    failed = run.failed()
    assert expected <= failed, f"caught by {sorted(failed) or 'nothing'}"


@pytest.mark.parametrize("variant", sorted({entry.values[2] for entry in BANK}))
def test_the_sound_run_raises_none(sound_run, family, variant):
    assert sound_run(family, variant).failed() == set()


def test_every_gate_catches_something():
    """A gate that no entry needs is a gate nobody has seen work."""
    variants = [Variant(**recipe) for recipe in VARIANTS.values()]
    gates = {check.gate_name for v in variants for check in variant_gates.checks_of(v)}
    assert set().union(*(entry.values[1] for entry in BANK)) == gates
