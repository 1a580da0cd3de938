"""What a safety batch has to be, or its rows would be compared elsewhere than at their responses."""

from safegrad_optim.batches._positions import IGNORE_INDEX, Batch, Positions, position_mask, starts_again


def check_batch(name: str, batch: Batch, positions: Positions) -> None:
    """Refuse a batch of 2-D fields without a response in each row; `name` is how errors call it."""
    input_ids, labels = batch["input_ids"], batch["labels"]
    if input_ids.dim() != 2 or input_ids.shape != labels.shape:
        raise ValueError(
            f"{name}: input_ids {tuple(input_ids.shape)} and labels {tuple(labels.shape)} have to be of one "
            "shape (rows, length)."
        )
    _check_labels(name, batch)
    _check_packing(name, batch)
    without = (~position_mask(batch, positions).any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(
            f"{name} has no response token in {len(without)} of {len(labels)} rows (first: row {without[0]}):"
            f" all labels after the first are {IGNORE_INDEX}. Label the response with its ids; check that "
            "truncation has left some."
        )


def _check_labels(name: str, batch: Batch) -> None:
    input_ids, labels = batch["input_ids"], batch["labels"]
    labelled = labels != IGNORE_INDEX
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        on_padding = int((labelled & (mask == 0)).sum())
        if on_padding:
            raise ValueError(
                f"{name}: {on_padding} labels are on padding, where attention_mask is 0. Set them to "
                f"{IGNORE_INDEX}."
            )
    others = (labelled & (labels != input_ids)).nonzero().tolist()
    if others:
        row, place = others[0]
        raise ValueError(
            f"{name}: in row {row} the label at place {place} is {int(labels[row, place])}, and the input id "
            f"{int(input_ids[row, place])}. Labels are the ids of the response at its own places."
        )


def _check_packing(name: str, batch: Batch) -> None:
    places, mask = batch.get("position_ids"), batch.get("attention_mask")
    if places is None or mask is None or places.shape != mask.shape:
        return
    if bool((starts_again(places) & (mask == 1)).any()):
        raise ValueError(
            f"{name} packs several texts into a row, for its position_ids start again, and an attention_mask "
            "lets each see those before it. Leave attention_mask out."
        )
