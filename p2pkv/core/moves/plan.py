"""The first step of a move, at its source: may it be made, and which chunks does it take?"""

from collections.abc import Iterable
from dataclasses import dataclass

from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import Location, Position
from p2pkv.core.keys import ChunkKey, Identity, Namespace, TokenBytes
from p2pkv.core.messages import PlanRequest
from p2pkv.core.prompt import prompt_of
from p2pkv.core.records import MemberRecord, Selection
from p2pkv.core.residency import Residencies, Residency
from p2pkv.errors import ErrorCode, Failure


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a move takes, prefix first.

    Attributes:
        residencies: At the source.
        num_tokens: Length of the prefix; with `Selection.ALL`, tokens of all chunks together.
    """

    residencies: tuple[Residency, ...]
    num_tokens: int

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What the target is told."""
        return tuple(residency.chunk for residency in self.residencies)


def unknown_location(position: Position, known: Iterable[Location]) -> Failure:
    """The failure that says what locations `position`'s instance has instead."""
    names = ", ".join(location.value for location in known)
    return Failure(
        ErrorCode.UNKNOWN_LOCATION,
        f"Instance {position.instance!r} has no location {position.location.value!r}; it has {names}.",
    )


def find_manifest(request: PlanRequest, book: Residencies, namespaces: dict[bytes, Namespace]) -> Manifest:
    """The chunks that `request` takes from `book`, those of its `reader` alone if it has one: nothing is leased yet.

    With tokens: their prefix (`find_prefix`). With `Selection.ALL`: everything that is owned, but for what hangs in the air
    because its prefix is gone.
    """
    if request.reader is not None:
        namespaces = {digest: each for digest, each in namespaces.items() if digest == request.reader}
    if request.selection is Selection.ALL:
        held = [each for each in book if each.slot is None and _is_of(namespaces.get(each.chunk.namespace), request.model)]
        rooted: dict[ChunkKey, Residency] = {}
        for each in sorted(held, key=lambda each: (each.chunk.start, each.chunk.key)):
            if not each.chunk.start or each.chunk.parent in rooted:
                rooted[each.chunk.key] = each
        return Manifest(residencies=tuple(rooted.values()), num_tokens=sum(each.chunk.token_count for each in rooted.values()))
    return find_prefix(book, namespaces, tokens=request.tokens, identity=request.identity, model=request.model)


def find_prefix(
    book: Residencies, namespaces: dict[bytes, Namespace], *, tokens: TokenBytes, identity: Identity, model: str | None
) -> Manifest:
    """All chunks in `book` that lie wholly inside `tokens` along the longest contiguous prefix.

    It is that of the namespace where it is longest: `model` narrows the choice, of equally long ones the first known wins.
    """
    best = Manifest(residencies=(), num_tokens=0)
    for namespace in namespaces.values():
        if _is_of(namespace, model):
            found = book.within(prompt_of(namespace, identity, tokens))
            num_tokens = max((each.chunk.end for each in found), default=0)
            if num_tokens > best.num_tokens:
                best = Manifest(residencies=tuple(found), num_tokens=num_tokens)
    return best


def _is_of(namespace: Namespace | None, model: str | None) -> bool:
    return namespace is not None and model in (None, namespace.model)


def namespace_problem(wanted: Iterable[Namespace], target: MemberRecord) -> Failure | None:
    """Why chunks of `wanted` are of no use at `target`: it has these models, but in caches that differ. None when it's fine."""
    for namespace in wanted:
        same_model = [each for each in target.namespaces if each.model == namespace.model]
        if same_model and namespace not in same_model:
            differs = namespace.difference(same_model[0])
            detail = f"Instance {target.instance!r} can't use chunks of {namespace.model!r}: {differs} (source / target)."
            return Failure(ErrorCode.NAMESPACE_MISMATCH, detail)
    return None
