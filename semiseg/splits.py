"""Class splits: which classes, and which share of their instances, come with masks. By class name, in TOML files.

A file lists `seen` (masks) or `unseen` (boxes only) classes, the other side is the complement; if it lists both,
together they are exactly the classes of the data set. A `[fraction]` table keeps a share of the masks of a class:

    name = "a_third_of_the_masks"
    [fraction]
    seed = 0
    default = 0.3
    person = 1.0

Names compare after Unicode normalisation (NFC) and trimming; case and underscores matter only for suggestions.
"""

from __future__ import annotations

import hashlib
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomlkit
from pydantic import ConfigDict, Field

from semiseg.config.read import digest, parse_config, read_toml
from semiseg.config.section import Section
from semiseg.errors import UserError, near_hint
from semiseg.files import write_text
from semiseg.project import find

_HASH_RANGE = 2**64


@dataclass(frozen=True)
class ClassSplit:
    """Which classes have masks (seen) and which only boxes (unseen): together the data set's, in its order."""

    name: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    # Class -> share of its instances that keep their mask, in [0, 1]; 0 for exactly the unseen classes.
    fractions: Mapping[str, float]
    seed: int = 0  # of the draw of instances where a fraction lies between 0 and 1
    dataset: str | None = None  # that the split is written for
    drawn_seed: int | None = None  # of the draw of the seen classes; None if they were named

    def keeps_mask(self, class_name: str, annotation_id: int) -> bool:
        """Whether this instance keeps its mask; a larger fraction keeps a superset (nested without lists)."""
        fraction = self.fractions[class_name]
        if fraction <= 0.0 or fraction >= 1.0:
            return fraction >= 1.0
        return _stable_hash(f"{self.seed}:{annotation_id}") < fraction * _HASH_RANGE

    def usual_fraction(self) -> tuple[float, dict[str, float]]:
        """The most frequent share of the seen classes, and class -> share of those that have another."""
        shares = {name: self.fractions[name] for name in self.seen}
        usual = statistics.mode(shares.values())
        return usual, {name: share for name, share in shares.items() if share != usual}

    def digest(self) -> str:
        """Digest of what decides which masks are kept; independent of names of files and order of classes."""
        drawn = any(0.0 < fraction < 1.0 for fraction in self.fractions.values())
        return digest({"fractions": dict(self.fractions), "seed": self.seed if drawn else None})


class _Drawn(Section):
    seed: int
    seen: int


class Fraction(Section):
    """Beside these keys each class may have its own share."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    seed: int = 0
    default: float = 1.0


class SplitFile(Section):
    """What a split file says; `name` is the file's name unless it says otherwise."""

    name: str
    dataset: str | None = None
    seen: list[str] | None = None
    unseen: list[str] | None = None
    drawn: _Drawn | None = None
    fraction: Fraction | None = None


def normalise(name: str) -> str:
    """The form in which class names compare: NFC, without surrounding blanks."""
    return unicodedata.normalize("NFC", name).strip()


def load_split(name_or_path: str, class_names: Sequence[str]) -> ClassSplit:
    """Reads a split file, found by `project.find`, and checks it against the classes of a data set."""
    path = find("splits", name_or_path)
    file = parse_config(SplitFile, {"name": path.stem, **read_toml(path)}, where=str(path))
    if file.seen is None and file.unseen is None and file.fraction is None:
        raise UserError(f"{path}: lists neither 'seen' nor 'unseen' classes and has no [fraction] table")
    return make_split(file, class_names, where=str(path))


def make_split(file: SplitFile, class_names: Sequence[str], *, where: str | None = None) -> ClassSplit:
    """Builds a checked split of either side or both, and of mask fractions of the seen classes.

    With fractions alone every class is seen, unless its fraction is 0. Errors name `where`, or the split.
    """
    written_for = f" (the split is written for {file.dataset})" if where and file.dataset else ""
    where = where or f"split {file.name!r}"
    fraction = file.fraction or Fraction()
    allowed = [normalise(item) for item in class_names]
    given = {normalise(item): share for item, share in fraction.__pydantic_extra__.items()}
    listed = {"seen": file.seen, "unseen": file.unseen}
    sides = {side: list(map(normalise, names)) for side, names in listed.items() if names is not None}
    for side, names in sides.items():
        if not names:
            raise UserError(f"{where}: {side!r} is empty: a split needs at least one class on each side")
        _check_names(names, allowed, f"{where}: {side!r}", written_for)
    _check_names(list(given), allowed, f"{where}: 'fraction'", written_for)
    for item, share in {"default": fraction.default, **given}.items():
        if not 0.0 <= share <= 1.0:
            raise UserError(f"{where}: fraction of {item!r} is {share}; allowed are 0 to 1")
    shares = {item: given.get(item, fraction.default) for item in allowed}
    if not any(shares.values()):
        raise UserError(f"{where}: every fraction is 0: a split needs at least one class with masks")
    are_listed = bool(sides)
    sides = sides or {"seen": [item for item in allowed if shares[item] > 0.0]}
    for side, other in (("seen", "unseen"), ("unseen", "seen")):
        sides.setdefault(side, [item for item in allowed if item not in sides.get(other, ())])
    if are_listed:
        _check_sides(sides, allowed, shares, given, where)
    return ClassSplit(
        name=file.name,
        seen=tuple(item for item in allowed if item in sides["seen"]),
        unseen=tuple(item for item in allowed if item in sides["unseen"]),
        fractions={item: shares[item] if item in sides["seen"] else 0.0 for item in allowed},
        seed=fraction.seed,
        dataset=file.dataset,
        drawn_seed=file.drawn.seed if file.drawn else None,
    )


def draw_seen(class_names: Sequence[str], *, count: int, seed: int) -> list[str]:
    """Draws `count` seen classes, ranked by a hash of seed and name: the same on every machine and in every order.

    A larger count of the same seed is a superset.
    """
    names = [normalise(name) for name in class_names]
    if not 0 < count < len(names):
        allowed = f"a number from 1 to {len(names) - 1}, as there are {len(names)} classes"
        raise UserError(f"--seen {count}: expected {allowed}")
    chosen = set(sorted(names, key=lambda name: _stable_hash(f"{seed}:{name}"))[:count])
    return [name for name in names if name in chosen]


def write_split(split: ClassSplit, path: Path) -> None:
    """Writes a split file that people can edit; it lists the shorter side, or the side that was drawn."""
    document = tomlkit.document()
    document.add("name", tomlkit.item(split.name))
    if split.dataset is not None:
        document.add("dataset", tomlkit.item(split.dataset))
    if split.unseen:
        side = "seen" if split.drawn_seed is not None or len(split.seen) <= len(split.unseen) else "unseen"
        listed = list(split.seen if side == "seen" else split.unseen)
        document.add(side, tomlkit.item(listed).multiline(len(listed) > 6))
    if split.drawn_seed is not None:
        document.add(tomlkit.nl())
        document.add(tomlkit.comment("The seen classes were drawn: `split make` with these numbers repeats it."))
        document.add("drawn", tomlkit.item({"seed": split.drawn_seed, "seen": len(split.seen)}))
    usual, others = split.usual_fraction()
    if not split.unseen or usual != 1.0 or others:
        document.add(tomlkit.nl())
        document.add("fraction", tomlkit.item({"seed": split.seed, "default": usual, **others}))
    write_text(path, tomlkit.dumps(document))


def _check_names(names: Sequence[str], allowed: Sequence[str], where: str, written_for: str) -> None:
    """Raises UserError for a class that the data set does not have, with the nearest one, or that is there twice."""
    unknown = [name for name in names if name not in allowed]
    if len(unknown) == len(names) > 1:
        raise UserError(
            f"{where}: none of its {len(names)} classes ({', '.join(map(repr, names[:3]))}, ...) is in the data set: "
            f"a split of another data set{written_for}? Allowed: {', '.join(allowed)}"
        )
    if unknown:
        hint = near_hint(unknown[0], allowed, otherwise="")
        raise UserError(f"{where}: unknown class {unknown[0]!r}{written_for}.{hint} Allowed: {', '.join(allowed)}")
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise UserError(f"{where}: class {doubled[0]!r} is listed twice")


def _check_sides(
    sides: Mapping[str, Sequence[str]],
    allowed: Sequence[str],
    shares: Mapping[str, float],
    given: Mapping[str, float],
    where: str,
) -> None:
    """Raises UserError if the sides are not a partition of the classes, or contradict the shares, given or default."""
    for side, names in sides.items():
        if not names:
            raise UserError(f"{where}: {side!r} would be empty: a split needs at least one class on each side")
    for name in allowed:
        seen, unseen = name in sides["seen"], name in sides["unseen"]
        if seen and unseen:
            reason = "both seen and unseen; allowed is one side per class"
        elif not seen and not unseen:
            reason = f"neither seen nor unseen; list one side to get the complement (classes: {', '.join(allowed)})"
        elif seen and shares[name] == 0.0:
            reason = "seen but its mask fraction is 0; list it as unseen"
        elif unseen and given.get(name, 0.0) > 0.0:
            reason = f"unseen but its mask fraction is {given[name]}; list it as seen"
        else:
            continue
        raise UserError(f"{where}: class {name!r} is {reason}")


def _stable_hash(text: str) -> int:
    """A number in 0..2**64 - 1, the same on every machine (Python's own `hash` is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
