"""Say from the ranks' positions who left before what, and who waits there: the sentence that a hang owes its user."""

import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from distnorm.errors import ranks_in_words
from distnorm.positions import Exchange, Position


def in_words(positions: Mapping[int, Position]) -> str:
    """Say in one line who left before what, and who waits there.

    Returns:
        E.g. `rank 2 left before layer4.0.bn1 (step 17); ranks 0, 1, 3 wait in its forward`; empty where no rank has
        entered any exchange.
    """
    if not any(position.trail for position in positions.values()):
        return ""
    sentences = [_parting(positions) or "; ".join(list(_waits(positions))[:2]) or _last_places(positions)]
    world = max(position.world_size for position in positions.values())
    if missing := sorted(set(range(world)) - positions.keys()):
        sentences.append(f"nothing to be read from {ranks_in_words(missing)}")
    away = [rank for rank, position in positions.items() if position.host != platform.node()]
    if away:
        sentences.append(f"{ranks_in_words(away)} ran on other hosts, whose last writes may not have arrived here")
    return "; ".join(sentences)


def _parting(positions: Mapping[int, Position]) -> str:
    """Find the first exchange of a group that was not the same one on all its ranks: gloo may have let them go on."""
    groups = {exchange.ranks for position in positions.values() for exchange in position.trail}
    for group in sorted(groups):
        ways: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        steps: dict[int, Exchange] = {}
        for rank in group:
            for exchange in positions[rank].trail if rank in positions else ():
                if exchange.ranks == group:
                    ways[exchange.number][exchange.what].append(rank)
                    steps[exchange.number] = exchange
        for number in sorted(ways):
            if len(ways[number]) > 1:
                parts = sorted(ways[number].items(), key=lambda item: len(item[1]))
                went = [f"{ranks_in_words(ranks)} went to {what}" for what, ranks in parts]
                return f"{' where '.join(went)}{_step_in_words(steps[number].step)}"
    return ""


def _waits(positions: Mapping[int, Position]) -> Iterator[str]:
    """Say of each exchange that ranks wait in who is missing there."""
    waiting: dict[tuple[str, tuple[int, ...], int], list[int]] = defaultdict(list)
    for rank, position in positions.items():
        if position.trail and position.trail[-1].waiting:
            last = position.trail[-1]
            waiting[last.what, last.ranks, last.number].append(rank)
    for (what, group, number), there in waiting.items():
        step = _step_in_words(positions[there[0]].trail[-1].step)
        others = [rank for rank in group if rank not in there]
        late = [r for r in others if r in positions and _reached(positions[r], group) < number]
        unknown = [r for r in others if r not in positions]
        past = [r for r in others if r not in late and r not in unknown]
        here = f"{ranks_in_words(there)} wait{'s' if len(there) == 1 else ''} in"
        layer, _, pass_ = what.rpartition(" ")
        if late:
            before, inside = {
                "forward": (layer, "its forward"),
                "backward": (f"{layer}'s backward", "it"),
            }.get(pass_, (what, "it"))
            yield f"{ranks_in_words(late)} left before {before}{step}; {here} {inside}; {_places(positions, late)}"
        elif unknown:
            yield f"{here} {what}{step} for {ranks_in_words(unknown)}"
        elif past:
            yield f"{here} {what}{step}, that {ranks_in_words(past)} left"
        else:
            yield f"{here} {what}{step}, all of its group: one ended in it, or the network failed"


def _last_places(positions: Mapping[int, Position]) -> str:
    return f"no rank waits in an exchange of a layer: {_places(positions, positions)}"


def _places(positions: Mapping[int, Position], ranks: Iterable[int]) -> str:
    """Say where ranks were last, those of one place together."""
    places: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        position = positions[rank]
        last = position.trail[-1] if position.trail else None
        place = "before any exchange" if last is None else f"{'in' if last.waiting else 'past'} {last.what}"
        place += _step_in_words(position.step if last is None else last.step)
        if last is not None and position.step != last.step:
            place += f" and had begun step {position.step}"
        places[place].append(rank)
    return ", ".join(f"{ranks_in_words(of)} {'was' if len(of) == 1 else 'were'} {at}" for at, of in places.items())


def _reached(position: Position, group: tuple[int, ...]) -> int:
    return max((exchange.number for exchange in position.trail if exchange.ranks == group), default=0)


def _step_in_words(step: int | None) -> str:
    return "" if step is None else f" (step {step})"


class Wait(NamedTuple):
    """An exchange that ended with a backend's error on this rank."""

    rank: int
    ranks: tuple[int, ...]
    what: str
    backend: str

    def in_words(self, missing: Sequence[int], positions: Mapping[int, Position]) -> str:
        """Say who waited, where and for whom; who never came, and where the others are, as far as that is known."""
        if missing:
            came = ranks_in_words(set(self.ranks) - set(missing))
            return (
                f"{ranks_in_words(missing)} never came to {self.what}; {came} did.\n"
                f"Look at the log of {ranks_in_words(missing)}: did it end before, or stall? Backend: {self.backend}"
            )
        places = in_words(positions)
        return (
            f"rank {self.rank} waited in {self.what} for ranks {', '.join(map(str, self.ranks))}; "
            "one of them failed or never came.\n"
            + (f"{places[0].upper()}{places[1:]}.\n" if places else "")
            + f"Does every rank run the same model, and reach this layer in every step? Backend: {self.backend}"
        )


class Header(NamedTuple):
    """What a rank is about to exchange."""

    what: str
    numbers: int
    dtype: str
    step: int | None


def compare(ranks: Sequence[int], headers: Sequence[Header]) -> str:
    """Say which ranks are about to make another exchange than the others; empty where all are at the same.

    Args:
        ranks: the ranks of a group.
        headers: what each is about to exchange, in the same order.
    """
    places: dict[Header, list[int]] = defaultdict(list)
    for rank, header in zip(ranks, headers, strict=True):
        places[header].append(rank)
    if len(places) == 1:
        return ""
    differ = [len({header[field] for header in places}) > 1 for field in range(4)]
    parts: list[str] = []
    for header, of in sorted(places.items(), key=lambda item: len(item[1])):
        with_ = f" with {header.numbers} numbers" if differ[1] and not differ[0] else ""
        with_ += f" in {header.dtype.removeprefix('torch.')}" if differ[2] and not differ[0] else ""
        step = _step_in_words(header.step) if differ[3] else ""
        parts.append(f"{ranks_in_words(of)} {'is' if len(of) == 1 else 'are'} at {header.what}{with_}{step}")
    step = "" if differ[3] else _step_in_words(headers[0].step)
    return (
        f"{', '.join(parts)}{step}.\nEvery rank must run the same layers with the same channels in every step, in "
        "training mode: is a branch\ntaken, or a layer frozen, on some ranks only?"
    )


class Whose(NamedTuple):
    """Whose numbers a rank brought to an exchange.

    Attributes:
        what: the exchange of a layer, e.g. `layer4.0.bn1 forward`.
        number: of the layer among those of its name and age, from 1.
        age: when it was made; equal ages are equal numbers, and that is all they say.
        call: of this exchange, from 1.
    """

    what: str
    number: int
    age: int
    call: int


SAME_LAYERS = (
    "Their numbers would have been pooled as one layer's: every rank must run the same layers in the same order. Is a "
    "branch taken,\nor a layer chosen by the data, on some ranks only?"
)


def parted(whose: Mapping[int, Whose], step: int | None = None) -> str:
    """Say which ranks brought which layer's numbers to one exchange.

    Args:
        whose: by rank; they are not all the same.
        step: of the training, where somebody said it.
    """
    places: dict[Whose, list[int]] = defaultdict(list)
    for rank, brought in whose.items():
        places[brought].append(rank)
    names, numbers, ages = ({brought[field] for brought in places} for field in range(3))
    parts: list[str] = []
    for brought, of in sorted(places.items(), key=lambda item: len(item[1])):
        part = f"{ranks_in_words(of)} {'is' if len(of) == 1 else 'are'} at {brought.what}"
        if len(names) > 1:
            which = ""
        elif len(numbers) > 1:
            which = f" of layer {brought.number} of that name"
        elif len(ages) > 1:
            which = " of another, made at another time" if parts else " of one layer of that name"
        else:
            which = f", call {brought.call}"
        parts.append(part + which)
    remedy = SAME_LAYERS
    if len(names) == 1 and max(len(numbers), len(ages)) > 1:
        remedy += " If not, name the layers: distnorm.check_ranks(model)."
    return f"{', '.join(parts)}{_step_in_words(step)}.\n{remedy}"
