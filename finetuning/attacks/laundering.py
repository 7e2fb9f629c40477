"""What a client can do to a downloaded adapter (T14): take the alignment out of it. No defence here answers this.

Knows LoRA factors; must not know jobs. The other way, a few more training steps on harmful rows, needs no code of ours.
"""

from finetuning.model.lora import Adapter, Factors


def without_first_rows(joined: Adapter, rank: int) -> Adapter:
    """A joined adapter less its first `rank` rows: in form F2 these are the alignment (methods.md 3).

    Form F2r mixes the rows, so there the result is a random part of both. Leaves `joined` as it is.
    """
    return {path: Factors(f.a[rank:].clone(), f.b[:, rank:].clone(), f.scale) for path, f in joined.items()}
