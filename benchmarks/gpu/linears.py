"""Part 3: how fast Linears of an 8 B model are in bfloat16, and in int8 by every way there is."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu import cards, layer, tiles
from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import device_seconds, eager_seconds
from helpers.quantization import int8_cuda
from helpers.quantization.int8_linear import absmax_scale, quantize_activations

# (in_features, out_features) of Llama-3.1-8B's, those that read one tensor stacked.
SHAPES = {
    "down": (14336, 4096),
    "gate_up": (4096, 28672),
    "qkv": (4096, 6144),
    "o": (4096, 4096),
}
DRY_SHAPES = {"down": (96, 64), "qkv": (64, 96)}
ROWS, DRY_ROWS = (4096, 1, 16, 256), (32, 1)
CACHED = 2**28  # bytes of weights to go round in, so that no cache holds them
MOST_COPIES, FEW_COPIES = 8, 2
SQUARE = 8192
FLOAT, ALONE = "bfloat16", "int8 product alone"
TORCH, CUBLAS, TRITON = "torch's passes", "fused around cuBLASLt", "fused in Triton"
LIBRARY, QUANTIZE = "as the library chooses", "fused quantization alone"
WHOLE = (TORCH, CUBLAS, TRITON, LIBRARY)  # ways of a whole Linear
CHECKED_ROWS = 512  # of float64 products at a time


def run(part: Part) -> None:
    """Time every product at every shape and number of rows; then equality checks and sums."""
    has_triton = part.device == "cuda" and not int8_cuda.triton_unavailable_reason(
        torch.device("cuda", 0)
    )
    part.note("scaled_mm of int8", _scaled_mm(part.device))
    part.note("int8 peak, operations a second", _peak(part))
    shapes, table = DRY_SHAPES if part.dry else SHAPES, []
    for rows in DRY_ROWS if part.dry else ROWS:
        for name, (inner, outer) in shapes.items():
            if part.over(need=4):
                return
            case = Case(part, rows, inner, outer)
            row = {"Linear": name, "rows": rows}
            table.append(row)
            case.measure(row, has_triton, lambda: part.note("microseconds", table))
            del case
        part.note("chosen by the library", int8_cuda.chosen_tiles())
        part.note(f"together at {rows} rows", _together(part, table, rows, shapes))
        if not part.over(need=4):
            part.note(f"reading a layer, {rows} rows", layer.measured(part, rows))


def _scaled_mm(device: str) -> str:
    """What `torch._scaled_mm` says to int8 operands."""
    a = torch.ones(32, 64, dtype=torch.int8, device=device)
    one = torch.ones(1, device=device)
    try:
        torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"refused: {str(error)[:120]}"
    return "taken"


def _peak(part: Part) -> float:
    """The most int8 operations a second that cuBLASLt does here, of square operands."""
    size = 128 if part.dry else SQUARE
    a, weight = torch.randint(-127, 128, (2, size, size), device=part.device, dtype=torch.int8)
    return 2 * size**3 / device_seconds([partial(torch._int_mm, a, weight.t())], part.device)


class Case:
    """One Linear at one number of rows, its weights as often as no cache holds them."""

    def __init__(self, part: Part, rows: int, inner: int, outer: int):
        self.part, self.rows, self.sizes = part, rows, (inner, outer)
        copies = FEW_COPIES if rows > 512 or part.dry else CACHED // (inner * outer) + 1
        draw = partial(torch.randint, -127, 128, device=part.device, dtype=torch.int8)
        self.weights = [draw((outer, inner)) for _ in range(min(copies, MOST_COPIES))]
        self.columns = torch.rand(outer, device=part.device) / 100
        self.x = torch.randn(rows, inner, device=part.device).bfloat16()

    def measure(self, row: dict, has_triton: bool, keep) -> None:
        """Add to a row microseconds by way, the best tile, and whether its integers are float64's.

        Args:
            keep: is called when there are new numbers.
        """
        row |= {way: self._us(call) for way, call in self._torch_ways().items()}
        if not has_triton:
            return keep()
        from helpers.quantization import int8_triton as passes

        row[QUANTIZE] = self._us(lambda _w: passes.launch_quantize_rows(self.x))
        row["quantization by size"] = self._by_size(passes)
        row[CUBLAS] = self._us(partial(self._by_library, int8_cuda.cublas_rescaled_product))
        library = partial(self._by_library, int8_cuda.rescaled_product)
        row[LIBRARY] = self._us(library)
        row[f"launched, {LIBRARY}"] = self._us(library, eager_seconds)
        keep()
        by_tile = self._by_tile(passes)
        row["by tile"] = "; ".join(f"{k}: {_short(v)}" for k, v in by_tile.items())
        timed = {k: v for k, v in by_tile.items() if isinstance(v, float)}
        if not timed:
            return keep()
        best = min(timed, key=timed.get)
        tile = int8_cuda.Tile(*best)
        row |= {"tile": str(best), "Triton product alone": timed[best]}
        row[TRITON] = self._us(partial(self._by_library, partial(passes.launch_product, tile=tile)))
        row["exact"] = self._is_exact(passes, tile)
        keep()

    def _by_size(self, passes) -> str:
        """Microseconds of the quantization by each size that is tried."""
        by = {
            (block, warps): partial(passes.launch_quantize_rows, self.x, block=block, warps=warps)
            for block, warps in tiles.QUANTIZED_BY
            if block < 2 * self.sizes[0]
        }
        return "; ".join(
            f"{k}: {_short(self._us(lambda _w, call=call: call()))}" for k, call in by.items()
        )

    def _by_tile(self, passes) -> dict[tuple, float | str]:
        """Microseconds of a product by each tile that is tried, or why there are none."""
        (values, scale), found = passes.launch_quantize_rows(self.x), {}
        for sizes in tiles.tried_for(self.rows):
            if self.part.left() < 6:
                break
            given = scale, self.columns, None, torch.bfloat16
            product = partial(passes.launch_product, tile=int8_cuda.Tile(*sizes))
            found[sizes] = self._us(
                lambda w, product=product, given=given: product(values, w, *given)
            )
        return found

    def _us(self, call, clock=device_seconds) -> float | str:
        calls = [partial(call, weight) for weight in self.weights]
        try:
            return round(1e6 * clock(calls, self.part.device), 2)
        except Exception as error:  # of many kinds: a tile does not fit the card
            return f"{type(error).__name__}: {str(error)[:80]}"

    def _torch_ways(self) -> dict:
        floats = [weight.bfloat16() / 64 for weight in self.weights]
        own = dict(zip(map(id, self.weights), floats, strict=True))
        scale = absmax_scale(self.x.float().abs().amax(-1, keepdim=True))
        values = quantize_activations(self.x.float(), scale)
        return {
            FLOAT: lambda w: linear(self.x, own[id(w)]),
            ALONE: lambda w: int8_cuda.multiply_cuda(values, w),
            TORCH: self._by_torch,
        }

    def _by_torch(self, weight: Tensor) -> Tensor:
        rows = self.x.float()
        scale = absmax_scale(rows.abs().amax(-1, keepdim=True))
        product = int8_cuda.multiply_cuda(quantize_activations(rows, scale), weight)
        return product.float().mul_(scale).mul_(self.columns).to(self.x.dtype)

    def _by_library(self, product, weight: Tensor) -> Tensor:
        values, scale = int8_cuda.quantize_rows_cuda(self.x)
        return product(values, weight, scale, self.columns, None, self.x.dtype)

    def _is_exact(self, passes, tile) -> bool | str:
        """Whether products by a tile are float64's, rounded once to bfloat16.

        Of operands as they are, and of a few ones among zeros, whose sums bfloat16 holds whole.
        """
        values, weight = passes.launch_quantize_rows(self.x)[0], self.weights[0]
        sparse = [_ones_among_zeros(*pair) for pair in ((values, 1 / 4), (weight, 1 / 16))]
        try:
            return all(self._same(passes, tile, *pair) for pair in ((values, weight), sparse))
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:80]}"

    def _same(self, passes, tile, values: Tensor, weight: Tensor) -> bool:
        ones = torch.ones(len(values) + len(weight), device=self.part.device)
        scales = ones[: len(values), None], ones[len(values) :]
        weight = int8_cuda.pack_cuda(weight)[0]
        y = passes.launch_product(values, weight, *scales, None, torch.bfloat16, tile=tile)
        few = (values[:8].cpu().double() @ weight[:512].cpu().double().t()).float().bfloat16()
        if not torch.equal(y[:8, :512].cpu(), few):
            return False
        wide = weight.double().t()
        parts = zip(values.split(CHECKED_ROWS), y.split(CHECKED_ROWS), strict=True)
        return all(torch.equal((a.double() @ wide).float().bfloat16(), b) for a, b in parts)


def _ones_among_zeros(like: Tensor, share: float) -> Tensor:
    """±1 in so large a share of the places, else 0."""
    draw = torch.rand(like.shape, device=like.device)
    return (draw < share).to(torch.int8) - 2 * (draw < share / 2).to(torch.int8)


def _short(value) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _card_name(part: Part) -> str:
    return torch.cuda.get_device_name() if part.device == "cuda" else ""


def _together(part: Part, table: list[dict], rows: int, shapes: dict) -> dict:
    """Times of all Linears of a layer together: the best int8 product against bfloat16."""
    layer_rows = [row for row in table if row["rows"] == rows]
    operations = sum(2 * rows * inner * outer for inner, outer in shapes.values())
    totals = {}
    for way in (FLOAT, *WHOLE, ALONE):
        if all(isinstance(row.get(way), float) for row in layer_rows):
            totals[way] = sum(row[way] for row in layer_rows)
    best = [min(row[way] for way in WHOLE if isinstance(row.get(way), float)) for row in layer_rows]
    totals["best int8"] = sum(best)
    peak = part.found["int8 peak, operations a second"]
    sheet = cards.INT8.get(_card_name(part))
    for way in ("best int8", LIBRARY):
        if way in totals:
            operations_a_second = operations / (totals[way] * 1e-6)
            totals[f"{way}, share of the int8 peak"] = operations_a_second / peak
            if sheet:
                totals[f"{way}, share of the data sheet's peak"] = operations_a_second / sheet
            if FLOAT in totals:
                totals[f"{way}, times as fast as bfloat16"] = totals[FLOAT] / totals[way]
    return totals
