"""What is known of a model's architecture: its Linears, and where smoothing scales can be folded.

A place is a producer, whose output channels can be divided by s, and the Linears that read it,
whose input channels are then multiplied by s. Every Linear that is called, but the head, is a
consumer of exactly one place. Where producer and Linear are fused, the consumer reads the
producer's last channels (v of qkv, up of gate_up). A place without a proof has no producer and says
why.

No family is listed here: `helpers.runtime.discovery` finds the places of a configuration on a tiny
twin and proves them. These are the words for what it finds; imports no torch.
"""

from dataclasses import dataclass, field

HEAD = "lm_head"  # of every family here; often tied to the embeddings
EXPERT = "{expert}"  # in a module's name: every expert of a block


@dataclass(frozen=True)
class Place:
    """One place of a model into which scales can be folded, by module names.

    Attributes:
        target: name of this kind of place in the study file.
        producer: the norm or Linear whose (last) output channels are divided by s; empty if no
            producer can be divided.
        consumers: the Linears that read it.
        readers: float matrices that also read it (a router); they are multiplied as well.
        norm_offset: what the norm adds to its weight before it multiplies: 1 for (1 + w).
        also: a second target, if one norm feeds both attention and MLP; either smooths both.
        refusal: why no scales can be folded here; empty if they can.
    """

    target: str
    producer: str
    consumers: tuple[str, ...]
    readers: tuple[str, ...] = ()
    norm_offset: float = 0.0
    also: str = ""
    refusal: str = ""

    def serves(self, targets: tuple[str, ...]) -> bool:
        """Whether the place belongs to one of the targets."""
        return self.target in targets or (bool(self.also) and self.also in targets)


@dataclass(frozen=True)
class Norm:
    """The formula of one norm: (x - mean(x) if `centred`) / sqrt(mean square + eps) · (offset + w).

    Attributes:
        name: of the module; its weight and, if it has one, its bias have this name.
    """

    name: str
    centred: bool
    eps: float
    offset: float


@dataclass(frozen=True)
class Logits:
    """Logits from the head's products: scale · product, or cap · tanh(scale · product / cap)."""

    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class Architecture:
    """What discovery has proved of one configuration.

    Attributes:
        name: the `model_type`.
        blocks: name of the list of decoder blocks.
        embeddings: names of the lookup tables, the token embeddings first.
        matrices: names of the other modules with a matrix, which stay float: routers, Linears of
            a class of their own, Linears that are never called or whose weight others read.
        experts: transformers' class that holds a block's experts as stacked tensors.
        plain: transformers' classes that compute what a plain Linear computes.
        logits: what becomes of the head's products.
        norms: the formula of each norm whose output one of the known formulas gives.
        places: in the order in which scales are folded: a Linear is a consumer before it is a
            producer.
    """

    name: str
    blocks: str
    embeddings: tuple[str, ...]
    matrices: tuple[str, ...] = ()
    experts: str = ""
    plain: tuple[str, ...] = ()
    logits: Logits = Logits()
    norms: tuple[Norm, ...] = field(default=(), repr=False)
    places: tuple[Place, ...] = field(default=(), repr=False)
