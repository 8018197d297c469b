"""What engines get (protocol rules S1 to S6, S8): memory to write, and leases on what they read."""

from dataclasses import replace

import pytest

from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.core.effects import ENGINE_STAGE, AdmitStaged, DropStaged, Effect, ReleaseChunks, ReleaseReason, Retrieved
from p2pkv.core.events import EngineClearRequested, EngineLost, ReadEnded, RetrieveRequested, ShardsSealed
from p2pkv.core.holdings import NAMESPACES_MAX
from p2pkv.core.keys import Identity, Namespace, TokenBytes
from p2pkv.core.serving import LEND_NBYTES, LEND_SHARDS
from p2pkv.errors import ErrorCode
from tests.core.builders import CPU, IDENTITY, LEASE_S, NAMESPACE, Limits, keys_of, pack, prompt
from tests.core.solo import CLIENT, Solo, staged_keys

TWO_WORKERS = replace(NAMESPACE, world_size=2)


def serving(capacity: int = 1000, namespace: Namespace = NAMESPACE, descriptors: int = 1000) -> Solo:
    """A machine with room for `capacity` chunks and an engine attached."""
    limits = Limits(cpu_limit_nbytes=capacity * PAGE_NBYTES, descriptor_limit=descriptors)
    solo = Solo(**limits)
    solo.attach(namespace=namespace)
    return solo


def retrieve(solo: Solo, tokens: TokenBytes, client: int = CLIENT) -> Retrieved:
    answer = solo.answer(solo.ask(lambda request: RetrieveRequested(request, client, IDENTITY, tokens)))
    assert answer is not None
    assert isinstance(answer.value, Retrieved)
    return answer.value


def dropped(ordered: list[Effect]) -> list[DropStaged]:
    return [effect for effect in ordered if isinstance(effect, DropStaged)]


def evicted(solo: Solo) -> list[bytes]:
    releases = solo.effects(ReleaseChunks)
    assert all(release.reason is ReleaseReason.EVICTED for release in releases)
    return [key for release in releases for key in release.keys]


# --- attach ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("namespace", "worker", "code"),
    [
        (replace(NAMESPACE, dtype="float13"), 0, ErrorCode.NAMESPACE_MISMATCH),
        (replace(NAMESPACE, chunk_size=8), 0, ErrorCode.NAMESPACE_MISMATCH),
        (NAMESPACE, 1, ErrorCode.INVALID_REQUEST),
        (TWO_WORKERS, -1, ErrorCode.INVALID_REQUEST),
    ],
)
def test_an_engine_that_cant_be_served_is_told_why(namespace: Namespace, worker: int, code: ErrorCode) -> None:
    solo = Solo()
    assert solo.failure(solo.attach(namespace=namespace, worker=worker)).code is code


def test_there_is_a_limit_to_the_models_of_one_instance() -> None:
    solo = Solo()
    for number in range(NAMESPACES_MAX):
        assert solo.failure_or_none(solo.attach(number, replace(NAMESPACE, model=f"m{number}"))) is None
    one_more = replace(NAMESPACE, model="one more")
    assert solo.failure(solo.attach(99, one_more)).code is ErrorCode.STORE_FULL
    assert solo.failure_or_none(solo.attach(99, replace(NAMESPACE, model="m3"))) is None


# --- store and look up ----------------------------------------------------------------------------------------------------


def test_a_prompt_is_found_again_its_partly_filled_chunk_included() -> None:
    solo = serving()
    assert solo.store(prompt(10)) == 10
    assert solo.held_tokens(prompt(10)) == 10
    assert solo.held_tokens(prompt(20)) == 10
    assert solo.held_tokens(prompt(9)) == 9
    assert solo.held_tokens(prompt(6) + pack(99)) == 6
    assert solo.held_tokens(pack(99)) == 0


def test_nothing_is_held_before_it_is_committed() -> None:
    solo = serving()
    lent = solo.lend(prompt(10))
    assert [(shard.key, shard.start, shard.token_count, shard.nbytes) for shard in lent.shards] == [
        (key, 4 * index, count, NAMESPACE.shard_nbytes(count))
        for index, (key, count) in enumerate(zip(keys_of(prompt(10)), (4, 4, 2), strict=True))
    ]
    assert (lent.next_token, lent.held_tokens, lent.failure) == (10, 0, None)
    assert solo.held_tokens(prompt(10)) == 0
    ordered_before = len(solo.done)
    solo.commit(lent)
    assert staged_keys(solo.done[ordered_before:]) == list(reversed(keys_of(prompt(10)))), "prefixes are used last"


def test_what_is_held_already_is_not_stored_again() -> None:
    solo = serving()
    solo.store(prompt(8))
    lent = solo.lend(prompt(10))
    assert [shard.start for shard in lent.shards] == [8]
    assert lent.held_tokens == 8
    solo.commit(lent)
    again = solo.lend(prompt(10))
    assert (again.lease, again.shards, again.next_token, again.held_tokens) == ("", (), 10, 10)


def test_a_longer_sibling_doesnt_replace_a_partial_chunk() -> None:
    solo = serving()
    solo.store(prompt(6))
    solo.store(prompt(7))
    assert solo.held_tokens(prompt(8)) == 7
    assert len(solo.machine.inventory_of("me")) == 3


def test_identities_and_models_dont_see_each_other() -> None:
    solo = serving()
    solo.attach(2, replace(NAMESPACE, model="other"))
    solo.store(prompt(8))
    assert solo.held_tokens(prompt(8), identity=Identity(cache_salt="tenant")) == 0
    assert solo.held_tokens(prompt(8), client=2) == 0


def test_what_one_engine_is_writing_is_not_lent_to_another() -> None:
    solo = serving()
    solo.attach(2)
    first = solo.lend(prompt(8))
    second = solo.lend(prompt(12), client=2)
    assert [shard.start for shard in second.shards] == [8]
    solo.commit(second, client=2)
    assert solo.held_tokens(prompt(12)) == 0, "there is no prefix yet"
    solo.commit(first)
    assert solo.held_tokens(prompt(12)) == 12


def test_a_long_prompt_is_lent_piece_by_piece() -> None:
    solo = serving()
    tokens = prompt(4 * (LEND_SHARDS + 3))
    lent = solo.lend(tokens)
    assert (len(lent.shards), lent.next_token) == (LEND_SHARDS, 4 * LEND_SHARDS)
    solo.commit(lent)
    rest = solo.lend(tokens, lent.next_token)
    assert ([shard.start for shard in rest.shards], rest.next_token) == ([256, 260, 264], 268)
    solo.commit(rest)
    assert solo.held_tokens(tokens) == 268


def test_what_was_lent_before_the_first_token_asked_for_is_not_lent_again() -> None:
    assert [shard.start for shard in serving().lend(prompt(12), 5).shards] == [4, 8]


def test_large_chunks_are_lent_few_at_a_time_but_at_least_one() -> None:
    huge = replace(NAMESPACE, head_dim=2**16, kv_heads=2**10)
    shard_nbytes = huge.shard_nbytes(4)
    assert shard_nbytes > LEND_NBYTES
    solo = serving(capacity=10 * shard_nbytes // PAGE_NBYTES, namespace=huge)
    assert len(solo.lend(prompt(12)).shards) == 1


# --- what isn't committed -------------------------------------------------------------------------------------------------


def test_shards_that_couldnt_be_sealed_are_dropped() -> None:
    solo = serving()
    lent = solo.lend(prompt(12))
    sealed = (lent.shards[0].key, lent.shards[2].key, b"never lent      ")
    request = solo.ask(lambda each: ShardsSealed(each, CLIENT, lent.lease, sealed))
    answer = solo.answer(request)
    assert answer is not None
    assert answer.value == 4
    assert dropped(solo.done) == [DropStaged(ENGINE_STAGE, CPU, lent.shards[1].key, 0)]


def test_a_commit_may_name_a_shard_twice() -> None:
    solo = serving(namespace=TWO_WORKERS)
    lent = solo.lend(prompt(4))
    key = lent.shards[0].key
    solo.ask(lambda each: ShardsSealed(each, CLIENT, lent.lease, (key, key)))
    assert solo.held_tokens(prompt(4)) == 0


def test_a_lease_ends_by_itself_and_a_late_commit_is_refused() -> None:
    solo = serving()
    lent = solo.lend(prompt(8))
    ordered = solo.run(LEASE_S)
    assert [drop.key for drop in dropped(ordered)] == keys_of(prompt(8))
    assert solo.failure(solo.commit(lent)).code is ErrorCode.DEADLINE_EXCEEDED
    assert solo.store(prompt(8)) == 8


@pytest.mark.parametrize("client", [1, 2])
def test_a_commit_counts_once_and_only_from_who_was_lent(client: int) -> None:
    solo = serving()
    solo.attach(2)
    lent = solo.lend(prompt(8))
    if client == 1:
        solo.commit(lent)
    assert solo.failure(solo.commit(lent, client=client)).code is ErrorCode.DEADLINE_EXCEEDED


def test_a_lost_engine_leaves_what_it_stored_and_nothing_else() -> None:
    solo = serving()
    solo.store(prompt(8))
    solo.lend(prompt(12))
    retrieve(solo, prompt(8))
    ordered = solo.happen(EngineLost(CLIENT))
    assert [drop.key for drop in dropped(ordered)] == keys_of(prompt(12))[2:]
    solo.machine.check_at_rest(solo.now)
    solo.attach(2)
    assert solo.held_tokens(prompt(12), client=2) == 8
    assert solo.happen(EngineLost(99)) == []


# --- several workers ------------------------------------------------------------------------------------------------------


def two_workers(capacity: int = 1000) -> Solo:
    solo = serving(capacity, TWO_WORKERS)
    solo.attach(2, TWO_WORKERS, worker=1)
    return solo


def test_a_chunk_is_owned_when_all_its_shards_are_in() -> None:
    solo = two_workers()
    first, second = solo.lend(prompt(4)), solo.lend(prompt(4), client=2)
    assert (first.worker, second.worker) == (0, 1)
    solo.commit(first)
    assert solo.held_tokens(prompt(4)) == 0
    solo.commit(second, client=2)
    assert solo.held_tokens(prompt(4)) == 4
    assert solo.effects(AdmitStaged) == [AdmitStaged(ENGINE_STAGE, CPU, first.shards[0].key)]


def test_a_worker_that_never_stores_its_shard_costs_the_chunk() -> None:
    solo = two_workers()
    solo.store(prompt(4))
    solo.run(LEASE_S / 2)
    late = solo.lend(prompt(4), client=2)
    solo.run(LEASE_S / 2)
    assert dropped(solo.done) == [], "the second worker's lease holds the chunk"
    ordered = solo.run(LEASE_S / 2)
    key = late.shards[0].key
    assert dropped(ordered) == [DropStaged(ENGINE_STAGE, CPU, key, 1), DropStaged(ENGINE_STAGE, CPU, key)]
    solo.machine.check_at_rest(solo.now)


def test_a_worker_that_lets_go_of_its_shard_may_be_lent_it_again() -> None:
    solo = two_workers()
    solo.store(prompt(4))
    lent = solo.lend(prompt(4), client=2)
    solo.ask(lambda each: ShardsSealed(each, 2, lent.lease, ()))
    assert solo.store(prompt(4), client=2) == 4


def test_mla_needs_one_worker_only() -> None:
    mla = replace(NAMESPACE, planes=1, world_size=2)
    solo = serving(namespace=mla)
    solo.attach(2, mla, worker=1)
    assert solo.store(prompt(4), client=2) == 4
    assert retrieve(solo, prompt(4)).worker == 0


def test_every_shard_is_charged() -> None:
    solo = two_workers(capacity=3)
    assert solo.lend(prompt(8)).failure is not None, "two chunks of two shards need four pages"


# --- full -----------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_prompt_makes_room() -> None:
    solo = serving(capacity=4)
    old, used = prompt(8), prompt(8, first=50)
    solo.store(old)
    solo.store(used)
    retrieve(solo, old)
    solo.run(LEASE_S)
    assert solo.store(prompt(4, first=90)) == 4
    assert evicted(solo) == [keys_of(used)[1]]
    assert solo.held_tokens(used) == 4


def test_a_prompts_own_prefix_is_never_evicted_for_its_suffix() -> None:
    solo = serving(capacity=3)
    solo.store(prompt(8))
    lent = solo.lend(prompt(16))
    assert [shard.start for shard in lent.shards] == [8]
    assert (lent.next_token, lent.held_tokens) == (12, 8)
    assert lent.failure is not None
    assert lent.failure.code is ErrorCode.STORE_FULL
    solo.commit(lent)
    assert solo.held_tokens(prompt(16)) == 12
    assert evicted(solo) == []


def test_a_prompt_larger_than_the_store_keeps_its_beginning() -> None:
    solo = serving(capacity=2)
    assert solo.store(prompt(16)) == 8
    again = solo.lend(prompt(16), 8)
    assert (again.lease, again.shards, again.next_token, again.held_tokens) == ("", (), 8, 8)


def test_descriptors_are_a_limit_too() -> None:
    solo = serving(descriptors=2)
    assert solo.store(prompt(16)) == 8


def test_what_is_read_is_not_evicted_until_it_was_read() -> None:
    solo = serving(capacity=2)
    solo.store(prompt(8))
    read = retrieve(solo, prompt(8))
    assert solo.store(prompt(8, first=50)) == 0
    solo.happen(ReadEnded(99, read.lease))
    assert solo.store(prompt(8, first=50)) == 0, "nobody ends another's lease"
    solo.happen(ReadEnded(CLIENT, read.lease))
    assert solo.store(prompt(8, first=50)) == 8


def test_a_reader_that_never_ends_blocks_nobody_for_long() -> None:
    solo = serving(capacity=2)
    solo.store(prompt(8))
    read = retrieve(solo, prompt(8))
    solo.run(LEASE_S)
    assert solo.store(prompt(8, first=50)) == 8
    assert solo.happen(ReadEnded(CLIENT, read.lease)) == []


# --- retrieve -------------------------------------------------------------------------------------------------------------


def test_the_longest_prefix_is_leased_for_reading() -> None:
    solo = serving()
    solo.store(prompt(10))
    read = retrieve(solo, prompt(7) + pack(99))
    assert (read.worker, read.location, read.num_tokens) == (0, CPU, 7)
    assert [(shard.start, shard.used_count, shard.token_count) for shard in read.shards] == [(0, 4, 4), (4, 3, 4)]
    assert [shard.nbytes for shard in read.shards] == [NAMESPACE.shard_nbytes(4)] * 2
    with pytest.raises(AssertionError, match="isn't at rest"):
        solo.machine.check_at_rest(solo.now)


def test_a_miss_leases_nothing() -> None:
    solo = serving()
    read = retrieve(solo, prompt(4))
    assert (read.lease, read.num_tokens, read.shards) == ("", 0, ())
    solo.machine.check_at_rest(solo.now)


def test_an_engine_clears_its_own_namespace_only() -> None:
    solo = serving()
    other = CLIENT + 1
    solo.attach(other, replace(NAMESPACE, weights="1"))
    for client in (CLIENT, other):
        solo.store(prompt(10), client=client)
    lent = solo.lend(prompt(4, first=100))
    cleared = solo.answer(solo.ask(lambda request: EngineClearRequested(request, CLIENT)))
    assert cleared is not None
    assert cleared.value == 10
    assert (solo.held_tokens(prompt(10)), solo.held_tokens(prompt(10), client=other)) == (0, 10)
    answer = solo.answer(solo.commit(lent))
    assert answer is not None
    assert answer.value == 4, "what was being written is not cleared"
