"""Part 3: how fast Linears of an 8 B model are in bfloat16, and in int8 by every way there is."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu import tiles
from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import device_seconds, eager_seconds
from helpers.quantization import cuda_products
from helpers.quantization.int8_linear import absmax_scale, quantize_activations

# (in_features, out_features) of Llama-3.1-8B's, those that read one tensor stacked.
SHAPES = {
    "down": (14336, 4096),
    "gate_up": (4096, 28672),
    "qkv": (4096, 6144),
    "o": (4096, 4096),
}
DRY_SHAPES = {"down": (96, 64), "qkv": (64, 96)}
ROWS, DRY_ROWS = (4096, 16, 256, 1), (32, 1)
CACHED = 2**28  # bytes of weights to go round in, so that no cache holds them
MOST_COPIES, FEW_COPIES = 8, 2
SQUARE = 8192
FLOAT, ALONE = "bfloat16", "int8 product alone"
TORCH, CUBLAS, TRITON = "torch's passes", "fused around cuBLASLt", "fused in Triton"
QUANTIZE = "fused quantization alone"
CHECKED_ROWS = 512  # of float64 products at a time


def run(part: Part) -> None:
    """Every way at every shape and number of rows; then what is equal, and the sums."""
    has_triton = part.device == "cuda" and not cuda_products.why_not_fused(torch.device("cuda", 0))
    part.note("scaled_mm of int8", _scaled_mm(part.device))
    part.note("int8 peak, operations a second", _peak(part))
    shapes, table = DRY_SHAPES if part.dry else SHAPES, []
    for rows in DRY_ROWS if part.dry else ROWS:
        for name, (inner, outer) in shapes.items():
            if part.over(need=4):
                return
            case = Case(part, rows, inner, outer)
            table.append({"Linear": name, "rows": rows, **case.measured(has_triton)})
            part.note("microseconds", table)
        part.note(f"together at {rows} rows", _together(part, table, rows, shapes))


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

    def measured(self, has_triton: bool) -> dict:
        """Microseconds by way, the best tile, and whether the integers are float64's."""
        found = {way: self._us(call) for way, call in self._torch_ways().items()}
        if not has_triton:
            return found
        from helpers.quantization import triton_kernels as kernels

        values, scale = kernels.quantize_rows(self.x)
        found[QUANTIZE] = self._us(lambda _w: kernels.quantize_rows(self.x))
        found[CUBLAS] = self._us(partial(self._around_cublas, kernels))
        best, by_tile = None, {}
        for sizes in tiles.tried_for(self.rows):
            if self.part.left() < 6:
                break
            tile = kernels.Tile(*sizes)
            try:
                by_tile[sizes] = self._us(
                    lambda w, tile=tile: kernels.product(
                        values, w, scale, self.columns, None, torch.bfloat16, tile=tile
                    )
                )
            except Exception as error:  # it does not fit the card
                by_tile[sizes] = f"{type(error).__name__}: {str(error)[:60]}"
        timed = {k: v for k, v in by_tile.items() if isinstance(v, float)}
        if timed:
            best = min(timed, key=timed.get)
            whole = partial(self._in_triton, kernels, kernels.Tile(*best))
            found[TRITON] = self._us(whole)
            found["Triton product alone"] = timed[best]
            found["exact"] = self._is_exact(kernels, kernels.Tile(*best))
            found["launched, fused in Triton"] = self._us(whole, eager_seconds)
        found["tile"] = str(best)
        found["by tile"] = "; ".join(f"{k}: {_short(v)}" for k, v in by_tile.items())
        return found

    def _us(self, call, clock=device_seconds) -> float | str:
        calls = [partial(call, weight) for weight in self.weights]
        try:
            return round(1e6 * clock(calls, self.part.device), 2)
        except RuntimeError as error:
            return str(error)[:80]

    def _torch_ways(self) -> dict:
        floats = [weight.bfloat16() / 64 for weight in self.weights]
        own = dict(zip(map(id, self.weights), floats, strict=True))
        scale = absmax_scale(self.x.float().abs().amax(-1, keepdim=True))
        values = quantize_activations(self.x.float(), scale)
        return {
            FLOAT: lambda w: linear(self.x, own[id(w)]),
            ALONE: lambda w: cuda_products.multiply(values, w),
            TORCH: self._by_torch,
        }

    def _by_torch(self, weight: Tensor) -> Tensor:
        rows = self.x.float()
        scale = absmax_scale(rows.abs().amax(-1, keepdim=True))
        product = cuda_products.multiply(quantize_activations(rows, scale), weight)
        return product.float().mul_(scale).mul_(self.columns).to(self.x.dtype)

    def _around_cublas(self, kernels, weight: Tensor) -> Tensor:
        values, scale = kernels.quantize_rows(self.x)
        product = cuda_products.multiply(values, weight)
        return kernels.rescale(product, scale, self.columns, None, self.x.dtype)

    def _in_triton(self, kernels, tile, weight: Tensor) -> Tensor:
        values, scale = kernels.quantize_rows(self.x)
        return kernels.product(values, weight, scale, self.columns, None, self.x.dtype, tile=tile)

    def _is_exact(self, kernels, tile) -> bool:
        """Whether a product with scales of 1 is float64's, on the card and in part on the CPU."""
        values, weight = kernels.quantize_rows(self.x)[0], self.weights[0]
        rows, ones = len(values), torch.ones_like(self.columns)
        scale = torch.ones(rows, 1, device=self.part.device)
        y = kernels.product(values, weight, scale, ones, None, torch.float32, tile=tile)
        few = values[:8].cpu().double() @ weight[:512].cpu().double().t()
        if not torch.equal(y[:8, :512].cpu(), few.float()):
            return False
        wide = weight.double().t()
        parts = zip(values.split(CHECKED_ROWS), y.split(CHECKED_ROWS), strict=True)
        return all(torch.equal((a.double() @ wide).float(), b) for a, b in parts)


def _short(value) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _together(part: Part, table: list[dict], rows: int, shapes: dict) -> dict:
    """All Linears of a layer, one after the other: the best int8 way against bfloat16."""
    mine = [row for row in table if row["rows"] == rows]
    operations = sum(2 * rows * inner * outer for inner, outer in shapes.values())
    found = {}
    for way in (FLOAT, TORCH, CUBLAS, TRITON, ALONE):
        if all(isinstance(row.get(way), float) for row in mine):
            found[way] = sum(row[way] for row in mine)
    best = [
        min(row[way] for way in (TORCH, CUBLAS, TRITON) if isinstance(row.get(way), float))
        for row in mine
    ]
    found["best int8"] = sum(best)
    if FLOAT in found:
        found["best int8, times as fast as bfloat16"] = found[FLOAT] / found["best int8"]
    peak = part.found["int8 peak, operations a second"]
    found["best int8, share of the int8 peak"] = operations / (found["best int8"] * 1e-6) / peak
    return found
