"""The planner of parts, by properties."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PlanError
from pipeline.flow.orders import PartLimits
from pipeline.units import GiB, MiB, TiB
from stages.write.parts import PartPlan, head_minimum, needs_parts, plan_parts

S3 = PartLimits()
EQUAL = PartLimits(equal=True)


def check(plan: PartPlan, limits: PartLimits, image_bytes_max: int) -> None:
    """What every plan keeps."""
    assert plan.parts[0].start == 0
    assert all(left.end == right.start and left.number + 1 == right.number for left, right in pairwise(plan.parts))
    assert plan.parts[-1].end == image_bytes_max
    assert len(plan.parts) <= limits.parts_max
    assert all(limits.part_min <= part.length <= limits.part_max for part in plan.parts[:-1])
    assert 0 < plan.parts[-1].length <= limits.part_max


@given(st.integers(8 * MiB + 1, 48 * TiB), st.sampled_from([0, 5 * MiB, 5 * MiB + 65536, 8 * MiB]))
def test_a_plan_tiles_the_longest_image_within_the_limits(size: int, head: int) -> None:
    plan = plan_parts(S3, image_bytes_max=size, head_length=head)
    check(plan, S3, size)
    body = [part.length for part in plan.body[:-1]]
    assert body == sorted(body), "parts grow, they never shrink"
    assert plan.head_length == head
    assert not head or plan.parts[0].length == head


@given(st.integers(8 * MiB + 1, 48 * TiB))
def test_a_store_that_wants_equal_parts_gets_them_with_a_head_of_that_length(size: int) -> None:
    head = head_minimum(EQUAL, size)
    plan = plan_parts(EQUAL, image_bytes_max=size, head_length=head)
    check(plan, EQUAL, size)
    assert {part.length for part in plan.parts[:-1]} <= {head}


@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(64 * 1024, 4 * MiB),
    st.integers(0, 400),
)
def test_small_stores_are_planned_or_refused_with_the_numbers(
    size_mib: int, parts_max: int, part_min: int, part_max_mib: int
) -> None:
    limits = PartLimits(
        part_min=part_min, part_max=part_min + part_max_mib * MiB, parts_max=parts_max, object_max=TiB, whole_max=MiB
    )
    size = size_mib * 7 * MiB
    if limits.parts_max * limits.part_max < size:
        with pytest.raises(PlanError, match=str(size)):
            plan_parts(limits, image_bytes_max=size)
    else:
        check(plan_parts(limits, image_bytes_max=size), limits, size)


def test_an_image_that_surely_fits_one_request_has_no_parts() -> None:
    plan = plan_parts(S3, image_bytes_max=S3.whole_max, head_length=65536)
    assert plan.single
    assert not needs_parts(S3, S3.whole_max)
    assert head_minimum(S3, S3.whole_max) == 0
    assert head_minimum(S3, S3.whole_max + 1) == 5 * MiB


def test_parts_stay_small_as_long_as_the_limits_allow() -> None:
    small = plan_parts(S3, image_bytes_max=78 * GiB, head_length=5 * MiB)
    assert {part.length for part in small.body[:-1]} == {8 * MiB}
    large = plan_parts(S3, image_bytes_max=2 * TiB, head_length=5 * MiB)
    assert {part.length for part in large.body[:999]} == {8 * MiB}
    assert large.longest < GiB


def test_an_image_beyond_the_store_is_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError, match=f"{60 * TiB} bytes.*{48 * TiB} bytes"):
        plan_parts(S3, image_bytes_max=60 * TiB)
    with pytest.raises(PlanError, match="10 parts of at most 1 MiB do not hold it"):
        plan_parts(PartLimits(part_min=MiB, part_max=MiB, parts_max=10), image_bytes_max=11 * MiB)


@pytest.mark.parametrize("head", [65536, 5 * MiB - 1, 6 * GiB])
def test_a_head_that_can_not_be_a_part_is_refused(head: int) -> None:
    with pytest.raises(PlanError, match="has to be a part of its own"):
        plan_parts(S3, image_bytes_max=20 * GiB, head_length=head)
