"""What a client can do to a downloaded adapter (T14): take the alignment out of it. No defence here answers this."""

from finetuning.model.lora import Adapter, Factors


def without_first_rows(joined: Adapter, rank: int) -> Adapter:
    """A joined adapter less its first `rank` rows: before they are mixed, these are the alignment.

    Mixed rows leave a random part of both. Leaves `joined` as it is.
    """
    return {path: Factors(f.a[rank:].clone(), f.b[:, rank:].clone(), f.scale) for path, f in joined.items()}
