"""Which links collectives take, and how long."""

import numpy as np
import pytest

from llm_jax.planner import links
from llm_jax.planner.chips import CHIPS
from llm_jax.planner.compiled import MeshAxis, Span
from llm_jax.planner.hlo_collectives import Collective, replica_groups
from llm_jax.planner.hlo_text import parse_instruction

V5P, V5E, TPU7X = CHIPS["v5p"], CHIPS["v5e"], CHIPS["tpu7x"]
RATE = V5P.link_bytes_per_second


def ring(size, dimension=0):
    return Span("link", dimension, size, True)


def line(size, dimension=0):
    return Span("link", dimension, size, False)


def collective(kind, size, groups=None, strategy=""):
    return Collective(kind, size, None, 1, (), "", (), False, "x", groups, strategy)


def seconds(kind, size, spans, chip=V5P, strategy="", distance=1):
    crossing = links.Crossing("fsdp", tuple(spans), distance)
    return links.seconds(collective(kind, size, strategy=strategy), crossing, chip)


def groups_of(text, devices):
    return replica_groups(
        parse_instruction(f"  %a = f32[8] all-reduce(%b), replica_groups={text}, x=1"), devices
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ],
)
def test_all_notations_of_groups(text, expected):
    assert groups_of(text, 4).tolist() == expected


def test_no_groups_means_all_devices():
    one = parse_instruction("  %a = f32[8] all-reduce(%b), to_apply=%add")
    assert replica_groups(one, 4).tolist() == [[0, 1, 2, 3]]


MESH = (
    MeshAxis("data", 1, ()),
    MeshAxis("fsdp", 8, (line(2, 1), ring(4, 2))),
    MeshAxis("tensor", 4, (ring(4, 0),)),
)


def test_axes_by_the_devices_that_take_part():
    places = np.arange(32).reshape(8, 4)
    cases = {
        "tensor": places,
        "fsdp": places.T,
        "fsdp+tensor": places.reshape(1, 32),
        "none": places.reshape(32, 1),
    }
    for axes, groups in cases.items():
        assert links.axes_of(collective("all-gather", 8, groups), MESH) == axes
    half = links.crossing(collective("all-gather", 8, places.T.reshape(8, 4)[:, :2]), MESH)
    assert half.axes == "fsdp"
    assert half.spans == (line(2, 2),), "a part of a ring is a line"
    around = np.array([[d, d - d % 4 + (d + 1) % 4] for d in range(32)])
    moved = links.crossing(collective("collective-permute", 8, around), MESH)
    assert (moved.axes, moved.distance) == ("tensor", 1)
    across = np.array([[d, (d + 8) % 32] for d in range(32)])
    assert links.crossing(collective("collective-permute", 8, across), MESH).distance == 2


def test_a_gather_takes_what_the_links_into_a_chip_take():
    size = 1e9
    on_ring = seconds("all-gather", size, [ring(4)])
    assert on_ring == pytest.approx(size * 3 / 4 / (2 * RATE), rel=1e-2)
    assert seconds("all-gather", size, [line(4)]) == pytest.approx(2 * on_ring, rel=1e-2)
    cube = seconds("all-gather", size, [ring(4, d) for d in range(3)])
    assert cube == pytest.approx(size * 63 / 64 / (6 * RATE), rel=1e-2)
    assert seconds("reduce-scatter", size, [ring(4)]) == on_ring
    assert seconds("all-reduce", size, [ring(4)]) == pytest.approx(2 * on_ring)


@pytest.mark.parametrize(
    ("strategy", "used"),
    [
        ('"emitter":"3DAllGatherOnMajorDim"', 6),
        ('"emitter":"1DAllGatherNonMajorDimImbalanced"', 2),
        ("UniDirectionNDRingStrategy{colors:6 phases:3", 6),
        ("StrategyND{colors:3 phases:3", 6),
        ("StrategyRing{colors:1 phases:1", 2),
        ('"phase_rings" ICI_RING_TYPE_UNIDIR_CW "phase_rings" ICI_RING_TYPE_UNIDIR_CCW', 2),
        ("", 6),
    ],
)
def test_the_compilers_strategy_may_leave_links_idle(strategy, used):
    assert links.links_used([ring(4, d) for d in range(3)], strategy) == used


def test_an_all_to_all_is_bound_by_the_cut():
    size = 1e9
    four, eight = (seconds("all-to-all", size, [ring(n)]) for n in (4, 8))
    assert eight == pytest.approx(2 * four, rel=1e-2)
    assert four == pytest.approx(size / 2 / RATE, rel=1e-2)
    assert seconds("all-to-all", size, [line(4)]) == pytest.approx(2 * four, rel=1e-2)


def test_permutes_by_their_distance():
    near, far = (seconds("collective-permute", 1e9, [ring(8)], distance=d) for d in (1, 3))
    assert near == pytest.approx(1e9 / RATE, rel=1e-2)
    assert far == pytest.approx(3 * near, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "span", "sent"),
    [
        ("all-reduce", Span("link", 0, 2, True, 8), 4.0),
        ("all-reduce", Span("link", 0, 2, True, 4), 2.0),
        ("all-reduce", Span("link", 0, 2, False, 2), 2.0),
        ("collective-permute", Span("link", 0, 4, True, 4), 4.0),
        ("all-to-all", Span("link", 0, 4, True, 4), 2.0),
    ],
)
def test_groups_that_interleave_share_the_links_between(kind, span, sent):
    """Loads of the busiest link, counted by hand on rings of 16 and 8 and a line of 4."""
    assert seconds(kind, 1e9, [span]) == pytest.approx(sent * 1e9 / RATE, rel=1e-2)


def test_part_of_an_axis_is_what_its_group_runs_over():
    mesh = (MeshAxis("fsdp", 16, (ring(4, 1), ring(4, 0))),)

    def part(group):
        return links.crossing(collective("all-gather", 8, np.array([group])), mesh).spans

    assert part([0, 1, 2, 3]) == (ring(4, 0),)
    assert part([0, 4, 8, 12]) == (ring(4, 1),)
    assert part([0, 2]) == (Span("link", 0, 2, True, 2),)
    assert part([0, 1, 2, 3, 8, 9, 10, 11])[-1] == ring(4, 0)


def test_each_device_of_a_chip_sends_its_own_to_all():
    cores = Span("core", 0, 2, False)
    slices = Span("network", 0, 2, False)
    for near in ([ring(4)], [slices]):
        alone = seconds("all-to-all", 1e9, near, TPU7X)
        assert seconds("all-to-all", 1e9, [*near, cores], TPU7X) == pytest.approx(alone, rel=0.05)


def test_two_devices_of_a_chip_share_its_links():
    cores = Span("core", 0, 2, False)
    both = seconds("all-gather", 1e9, [ring(4), cores], TPU7X)
    one_each = seconds("all-gather", 1e9, [ring(4)], TPU7X)
    assert one_each == pytest.approx(2 * both, rel=1e-2)
    inside = seconds("all-gather", 1e9, [cores], TPU7X)
    assert inside < both / 2


def test_gpus_of_a_host_have_one_port_to_a_switch():
    h100 = CHIPS["h100"]
    for kind in ("all-gather", "all-to-all"):
        taken = seconds(kind, 1e9, [ring(8)], h100)
        assert taken == pytest.approx(1e9 * 7 / 8 / h100.link_bytes_per_second, rel=1e-2)


def test_slices_exchange_shares_over_the_network():
    size = 1e9
    slices = Span("network", 0, 2, False)
    alone = seconds("all-reduce", size, [slices], V5E)
    assert alone == pytest.approx(size / V5E.network_bytes_per_second, rel=1e-2)
    both = seconds("all-reduce", size, [line(4), slices], V5E)
    within = seconds("all-reduce", size, [line(4)], V5E)
    assert both == pytest.approx(within + alone / 4, rel=1e-2)


def test_small_messages_cost_their_hops():
    tiny = seconds("all-reduce", 4, [ring(16)])
    assert 8e-6 < tiny < 40e-6
    assert seconds("all-gather", 4, []) == 0
