"""Layouts: the same instances as the folder of that name configures, and a virtual network as slow as they say."""

from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from p2pkv.commands.up import read_folder
from p2pkv.core.events import MessageReceived
from sims.layout import FOLDER, Layout, Way, layout_names, load_layout
from sims.network import Clock, Network
from sims.scenario import Faults, Scenario, ScenarioError, load_scenario, parse_scenario, scenario_names
from sims.world import World
from tests.sims.runs import SEEDS

INSTANT = Faults(delay_s=(0.0, 0.0))


@pytest.mark.parametrize("name", layout_names())
def test_a_layout_is_of_the_instances_that_its_folder_configures(name: str) -> None:
    configs = read_folder(FOLDER / name).values()
    groups = {config.lmcache_instance_id: config.zone for config in configs}
    layout = load_layout(name)
    assert groups == {member: layout.group_of(member) for member in layout.names}
    assert 0 < len(layout.description) < 130
    ports = [config.lmcache_worker_port for config in configs] + [config.distributed_url for config in configs]
    assert len(set(ports)) == 2 * len(layout.names), "all run on one host"


def test_the_ring_is_as_long_as_its_racks_are_apart() -> None:
    ring = load_layout("ring_of_racks")
    near, far = ring.way("rack_1_1", "rack_2_1"), ring.way("rack_1_1", "rack_3_1")
    assert ring.way("rack_1_1", "rack_1_2").delay_s < near.delay_s < far.delay_s
    assert ring.way("rack_1_1", "rack_4_2").delay_s == near.delay_s
    assert {ring.nearest(group) for group in ("rack_2", "rack_4")} == {"rack_1"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": {"a": ["x"], "b": ["x"]}},
        {"groups": {"a": ["x"], "b": []}},
        {"groups": {"a": ["x"]}, "between": []},
        {"between": []},
        {"between": [{"groups": ["a", "c"], "delay_s": [0, 1]}]},
        {"between": 2 * [{"groups": ["a", "b"], "delay_s": [0, 1]}]},
        {"within": {"delay_s": [0, 1], "los": 1}},
    ],
)
def test_what_is_no_layout_is_refused(wrong: dict[str, Any]) -> None:
    right = {
        "description": "two",
        "groups": {"a": ["x"], "b": ["y"]},
        "within": {"delay_s": [0, 1]},
        "between": [{"groups": ["b", "a"], "delay_s": [0, 1]}],
    }
    assert Layout.model_validate(right).names == ("x", "y")
    with pytest.raises(ValidationError):
        Layout.model_validate(right | wrong)


def test_a_message_takes_as_long_as_its_way() -> None:
    zones, clock = load_layout("three_zones"), Clock()
    network = Network(clock, Random("ways"), INSTANT, zones)
    for one, other in (("zone_a_1", "zone_a_2"), ("zone_a_1", "zone_b_1"), ("zone_c_2", "zone_b_1")):
        shortest, longest = zones.way(one, other).delay_s
        taken = [network.delay(one, other) for _ in range(200)]
        assert shortest <= min(taken) < max(taken) <= longest
    assert network.delay("zone_a_1", "zone_a_1") == 0.0


def test_a_way_loses_messages_until_the_network_is_healed() -> None:
    lossy = load_layout("three_zones").model_copy(update={"within": Way(delay_s=(0.0, 0.0), loss=1.0)})
    network = Network(Clock(), Random("loss"), INSTANT, lossy)
    network.carelessly(lambda: None, "zone_a_1", "zone_a_2")
    network.heal()
    network.carelessly(lambda: None, "zone_a_1", "zone_a_2")
    assert network.lost_count == 1


def test_who_is_deaf_hears_nothing_and_is_heard() -> None:
    world = World("deaf", Scenario(description="two", instances=2))
    world.clock.run(until=1.0)
    heard = {"i0": 0, "i1": 0}

    def count(at: float, name: str, what: object) -> None:
        heard[name] += isinstance(what, MessageReceived)

    world.network.deafen("i1", "i0", seconds=2.0)
    world.clock.run(until=1.1)  # what was on its way has arrived
    world._recorder = count
    assert (world.network.is_deaf("i1", "i0"), world.network.is_deaf("i0", "i1")) == (True, False)
    world.clock.run(until=2.9)
    assert heard["i0"] > 0
    assert heard["i1"] == 0
    world.clock.run(until=4.0)
    assert heard["i1"] > 0


def test_a_boot_by_a_clock_set_back_is_a_later_boot() -> None:
    world = World("set back", Scenario(description="two", instances=2))
    world.clock.run(until=1.0)
    before = world.nodes["i1"].machine.config
    world.set_clock_back("i1")
    world.crash("i1")
    world.start("i1")
    after = world.nodes["i1"].machine.config
    assert (after.generation, after.wall_offset_s) == (before.generation + 1, before.wall_offset_s - 3600)
    world.clock.run(until=3.0)
    assert [each.generation for each in world.nodes["i0"].machine.members()][1] == after.generation


def test_a_scenario_names_its_layout() -> None:
    text = "description: x\nlayout: three_zones"
    assert parse_scenario(text, "x.yaml").names == load_layout("three_zones").names
    assert Scenario(description="x", instances=2).names == ("i0", "i1")
    for wrong, told in (
        ("layout: nowhere", "three_zones"),
        ("layout: three_zones\ninstances: 6", "layout says"),
        ("blows: {group_cuts: 1}", "need a layout"),
    ):
        with pytest.raises(ScenarioError, match=told):
            parse_scenario(f"description: x\n{wrong}", "x.yaml")


def test_each_scenario_is_run_by_the_long_tests_and_each_layout_by_a_scenario() -> None:
    assert set(SEEDS) == set(scenario_names())
    used = [load_scenario(name).layout for name in scenario_names()]
    assert all(load_layout(name) in used for name in layout_names())
