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

import difflib
import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import Field

from semiseg.config import Section
from semiseg.config.read import digest, parse_config, read_toml
from semiseg.errors import UserError
from semiseg.resources import find, write_text

_HASH_RANGE = 2**64


@dataclass(frozen=True)
class ClassSplit:
    """Which classes have masks (seen) and which only boxes (unseen); both in the data set's order.

    Attributes:
        name: of the split; not part of its digest.
        seen, unseen: disjoint; together the classes of the data set.
        fractions: class -> share of its instances that keep their mask, in [0, 1]; 0 for exactly the unseen classes.
        seed: of the draw of instances where a fraction lies between 0 and 1.
        dataset: the data set that the split is written for, as a hint in messages.
        drawn_seed: seed of the draw of the seen classes, or None if they were named.
    """

    name: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    fractions: Mapping[str, float]
    seed: int = 0
    dataset: str | None = None
    drawn_seed: int | None = None

    def keeps_mask(self, class_name: str, annotation_id: int) -> bool:
        """Whether this instance keeps its mask; a larger fraction keeps a superset (nested without lists)."""
        fraction = self.fractions[class_name]
        if fraction <= 0.0 or fraction >= 1.0:
            return fraction >= 1.0
        return _stable_hash(f"{self.seed}:{annotation_id}") < fraction * _HASH_RANGE

    def digest(self) -> str:
        """Digest of what decides which masks are kept; independent of names of files and order of classes."""
        drawn = any(0.0 < fraction < 1.0 for fraction in self.fractions.values())
        return digest({"fractions": dict(self.fractions), "seed": self.seed if drawn else None})


class _Drawn(Section):
    seed: int
    seen: int


class _SplitFile(Section):
    name: str | None = None
    dataset: str | None = None
    seen: list[str] | None = None
    unseen: list[str] | None = None
    drawn: _Drawn | None = None
    fraction: dict[str, Any] = Field(default_factory=dict)


def normalise(name: str) -> str:
    """The form in which class names compare: NFC, without surrounding blanks."""
    return unicodedata.normalize("NFC", name).strip()


def load_split(name_or_path: str, class_names: Sequence[str]) -> ClassSplit:
    """Reads a split file and checks it against the classes of a data set.

    Args:
        name_or_path: see `resources.find`.
        class_names: the data set's classes.

    Raises:
        UserError: unknown, doubled or overlapping class, empty side, split of another data set; names file, class
            and allowed names.
    """
    path = find("splits", name_or_path)
    values = parse_config(_SplitFile, read_toml(path), where=str(path))
    if values.seen is None and values.unseen is None and not values.fraction:
        raise UserError(f"{path}: lists neither 'seen' nor 'unseen' classes and has no [fraction] table")
    fractions = dict(values.fraction)
    seed = _take_number(fractions, "seed", 0, int, path)
    default = float(_take_number(fractions, "default", 1.0, float, path))
    return make_split(
        values.name or path.stem,
        class_names,
        seen=values.seen,
        unseen=values.unseen,
        fractions={key: _take_number(fractions, key, 1.0, float, path) for key in list(fractions)},
        default_fraction=default,
        seed=seed,
        dataset=values.dataset,
        drawn_seed=values.drawn.seed if values.drawn else None,
        where=str(path),
    )


def make_split(
    name: str,
    class_names: Sequence[str],
    *,
    seen: Sequence[str] | None = None,
    unseen: Sequence[str] | None = None,
    fractions: Mapping[str, float] | None = None,
    default_fraction: float = 1.0,
    seed: int = 0,
    dataset: str | None = None,
    drawn_seed: int | None = None,
    where: str | None = None,
) -> ClassSplit:
    """Builds a checked split from names (either side or both) and mask fractions of the seen classes.

    With fractions alone every class is seen, unless its fraction is 0.

    Args:
        fractions: class -> share in [0, 1]; other seen classes have `default_fraction`.
        where: place named in errors; the split's name if None.
    """
    place = where or f"split {name!r}"
    allowed = [normalise(item) for item in class_names]
    given = {side: _check_side(side, names, allowed, place, dataset) for side, names in _sides(seen, unseen)}
    shares = _check_fractions(fractions or {}, default_fraction, allowed, place, dataset)
    if given:
        seen_names = given["seen"] if "seen" in given else [c for c in allowed if c not in given["unseen"]]
        unseen_names = given["unseen"] if "unseen" in given else [c for c in allowed if c not in given["seen"]]
        _check_sides(seen_names, unseen_names, allowed, place)
        _check_shares(shares, fractions or {}, seen_names, unseen_names, place)
    else:
        seen_names = [c for c in allowed if shares[c] > 0.0]
    chosen = set(seen_names)
    return ClassSplit(
        name=name,
        seen=tuple(c for c in allowed if c in chosen),
        unseen=tuple(c for c in allowed if c not in chosen),
        fractions={c: shares[c] if c in chosen else 0.0 for c in allowed},
        seed=seed,
        dataset=dataset,
        drawn_seed=drawn_seed,
    )


def draw_seen(class_names: Sequence[str], *, count: int, seed: int) -> list[str]:
    """Draws `count` seen classes; a larger count of the same seed is a superset, whatever the order of the names.

    Classes are ranked by a hash of seed and name, so that the draw is the same on every machine and version.
    """
    names = [normalise(name) for name in class_names]
    if not 0 < count < len(names):
        raise UserError(
            f"--seen {count}: expected a number from 1 to {len(names) - 1}, as there are {len(names)} classes"
        )
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
    shares = {name: split.fractions[name] for name in split.seen}
    if not split.unseen or any(share != 1.0 for share in shares.values()):
        document.add(tomlkit.nl())
        document.add("fraction", tomlkit.item(_fraction_table(shares, split.seed)))
    write_text(path, tomlkit.dumps(document))


def unknown_class(name: str, allowed: Sequence[str], where: str, dataset: str | None = None) -> UserError:
    """The error for a class name that the data set does not have, with the nearest allowed one."""
    keys = {_suggestion_key(item): item for item in allowed}
    near = difflib.get_close_matches(_suggestion_key(name), list(keys), n=1, cutoff=0.6)
    hint = f" Did you mean {keys[near[0]]!r}?" if near else ""
    written_for = f" (the split is written for {dataset})" if dataset else ""
    return UserError(f"{where}: unknown class {name!r}{written_for}.{hint} Allowed: {', '.join(allowed)}")


def _sides(seen: Sequence[str] | None, unseen: Sequence[str] | None) -> list[tuple[str, Sequence[str]]]:
    return [(side, names) for side, names in (("seen", seen), ("unseen", unseen)) if names is not None]


def _check_side(side: str, names: Sequence[str], allowed: Sequence[str], where: str, dataset: str | None) -> list[str]:
    result = [normalise(name) for name in names]
    if not result:
        raise UserError(f"{where}: {side!r} is empty: a split needs at least one class on each side")
    _check_known(result, allowed, f"{where}: {side!r}", dataset)
    doubled = sorted({name for name in result if result.count(name) > 1})
    if doubled:
        raise UserError(f"{where}: {side!r}: class {doubled[0]!r} is listed twice")
    return result


def _check_known(names: Iterable[str], allowed: Sequence[str], where: str, dataset: str | None) -> None:
    names = list(names)
    unknown = [name for name in names if name not in allowed]
    if not unknown:
        return
    if len(unknown) == len(names) > 1:
        written_for = f" (it is written for {dataset})" if dataset else ""
        raise UserError(
            f"{where}: none of its {len(names)} classes ({', '.join(map(repr, names[:3]))}, ...) is in the data set: "
            f"a split of another data set{written_for}? Allowed: {', '.join(allowed)}"
        )
    raise unknown_class(unknown[0], allowed, where, dataset)


def _check_sides(seen: Sequence[str], unseen: Sequence[str], allowed: Sequence[str], where: str) -> None:
    both = [name for name in allowed if name in seen and name in unseen]
    if both:
        raise UserError(f"{where}: class {both[0]!r} is both seen and unseen; allowed is one side per class")
    missing = [name for name in allowed if name not in seen and name not in unseen]
    if missing:
        raise UserError(
            f"{where}: class {missing[0]!r} is neither seen nor unseen; list one side only to get the complement"
            f" (classes: {', '.join(allowed)})"
        )
    for side, names in (("seen", seen), ("unseen", unseen)):
        if not names:
            raise UserError(f"{where}: {side!r} would be empty: a split needs at least one class on each side")


def _check_fractions(
    fractions: Mapping[str, float], default: float, allowed: Sequence[str], where: str, dataset: str | None
) -> dict[str, float]:
    given = {normalise(name): share for name, share in fractions.items()}
    _check_known(given, allowed, f"{where}: 'fraction'", dataset)
    shares = {name: float(given.get(name, default)) for name in allowed}
    for name, share in {"default": default, **given}.items():
        if not 0.0 <= share <= 1.0:
            raise UserError(f"{where}: fraction of {name!r} is {share}; allowed are 0 to 1")
    if all(share == 0.0 for share in shares.values()):
        raise UserError(f"{where}: every fraction is 0: a split needs at least one class with masks")
    return shares


def _check_shares(
    shares: Mapping[str, float],
    fractions: Mapping[str, float],
    seen: Sequence[str],
    unseen: Sequence[str],
    where: str,
) -> None:
    for name in seen:
        if shares[name] == 0.0:
            raise UserError(f"{where}: class {name!r} is seen but its mask fraction is 0; list it as unseen")
    for name in map(normalise, fractions):
        if name in unseen and shares[name] > 0.0:
            raise UserError(
                f"{where}: class {name!r} is unseen but its mask fraction is {shares[name]}; list it as seen"
            )


def _take_number(table: dict[str, Any], key: str, default: Any, kind: type, where: Path) -> Any:
    value = table.pop(key, default)
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits:
        raise UserError(f"{where}: 'fraction.{key}': expected a number, not {value!r}")
    return value


def _fraction_table(shares: Mapping[str, float], seed: int) -> dict[str, Any]:
    values = list(shares.values())
    default = max(set(values), key=values.count)
    return {"seed": seed, "default": default, **{name: share for name, share in shares.items() if share != default}}


def _suggestion_key(name: str) -> str:
    return " ".join(normalise(name).casefold().replace("_", " ").replace("-", " ").split())


def _stable_hash(text: str) -> int:
    """A number in 0..2**64 - 1, the same on every machine (Python's own `hash` is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
