"""The runtime directory: who lives, who they are, and who is refused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pkv.errors import ConfigError, InstanceIdInUseError
from p2pkv.rendezvous import NodeCard, Place, claim, is_living, living_cards, place_of, publish, read_card, runtime_directory


def card_of(instance: str) -> NodeCard:
    return NodeCard(
        instance=instance,
        generation=7,
        pid=os.getpid(),
        ws="127.0.0.1:1",
        http="http://127.0.0.1:2",
        transfer="127.0.0.1:3",
        shared=None,
        rendezvous="localhost:4",
    )


@contextmanager
def living(directory: Path, instance: str) -> Iterator[Place]:
    place = place_of(directory, "p2pkv", instance)
    with claim(place):
        publish(place, card_of(instance))
        yield place


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return runtime_directory({"P2PKV_RUNTIME_DIR": str(tmp_path / "run")})


def test_living_nodes_find_each_other_by_name(directory: Path) -> None:
    with living(directory, "b"), living(directory, "a"):
        assert living_cards(directory, "p2pkv") == [card_of("a"), card_of("b")]
    assert living_cards(directory, "p2pkv") == []


def test_nodes_of_another_cluster_are_not_found(directory: Path) -> None:
    with living(directory, "a"):
        assert living_cards(directory, "other") == []


def test_a_second_node_of_the_same_name_is_refused_by_name(directory: Path) -> None:
    with living(directory, "a"):
        with pytest.raises(InstanceIdInUseError, match="named 'a' runs on this host already"), living(directory, "a"):
            pass
        assert living_cards(directory, "p2pkv") == [card_of("a")]


def test_a_name_is_free_again_after_its_node(directory: Path) -> None:
    with living(directory, "a"):
        pass
    with living(directory, "a") as place:
        assert is_living(place)


def test_a_killed_node_is_not_living(directory: Path) -> None:
    place = place_of(directory, "p2pkv", "a")
    ready, tell = os.pipe()
    if (child := os.fork()) == 0:
        with living(directory, "a"):
            os.write(tell, b"!")
            os.kill(os.getpid(), 9)
    assert os.read(ready, 1) == b"!"
    os.waitpid(child, 0)
    os.close(ready)
    os.close(tell)
    assert not is_living(place)
    assert read_card(place) is not None


def test_the_next_node_gets_the_last_ones_card_and_others_do_not_see_it_any_more(directory: Path) -> None:
    with living(directory, "a") as place:
        pass
    with claim(place) as last:
        assert last == card_of("a")
        assert living_cards(directory, "p2pkv") == []


def test_sockets_left_behind_are_removed_on_both_ends_of_a_claim(directory: Path) -> None:
    with living(directory, "a") as place:
        place.engine_socket.touch()
    assert not place.engine_socket.exists()
    place.lane_socket.touch()
    with living(directory, "a"):
        assert not place.lane_socket.exists()


@pytest.mark.parametrize("garbage", [b"", b"[]", b"\xff\xfe", b'{"instance": "a"}', b"{" * 9000, b"null"])
def test_a_garbage_card_is_skipped(directory: Path, garbage: bytes) -> None:
    with living(directory, "a") as place, living(directory, "b"):
        place.card.write_bytes(garbage)
        assert living_cards(directory, "p2pkv") == [card_of("b")]


def test_a_card_with_wrong_types_or_anothers_name_is_skipped(directory: Path) -> None:
    with living(directory, "a") as place:
        place.card.write_text(place.card.read_text().replace("7", '"7"'))
        assert read_card(place) is None
        publish(place, card_of("b"))
        assert read_card(place) is None


def test_the_directory_is_the_first_that_the_environment_names(tmp_path: Path) -> None:
    environ = {"TMPDIR": str(tmp_path)}
    assert runtime_directory(environ) == tmp_path / f"p2pkv-{os.geteuid()}"
    environ["XDG_RUNTIME_DIR"] = str(tmp_path)
    assert runtime_directory(environ) == tmp_path / "p2pkv"
    environ["P2PKV_RUNTIME_DIR"] = str(tmp_path / "mine")
    assert runtime_directory(environ) == tmp_path / "mine"
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="0700"):
        runtime_directory({"P2PKV_RUNTIME_DIR": str(tmp_path / "open")})


def test_a_link_or_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match="P2PKV_RUNTIME_DIR"):
            runtime_directory({"P2PKV_RUNTIME_DIR": str(tmp_path / name)})


def test_a_socket_path_that_is_too_long_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="P2PKV_RUNTIME_DIR to a shorter"):
        place_of(tmp_path / ("x" * 100), "p2pkv", "a")
