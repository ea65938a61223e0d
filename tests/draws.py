"""Calls drawn at random: shapes, strides, dtypes, options and targets, and the runs that try few of
them or many."""

import inspect
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

# of a slow run. Triton's interpreter takes a second where the others take a hundredth
MANY, INTERPRETED = 500, 40

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
layouts = st.sampled_from(["contiguous", "transposed", "sliced", "stepped", "shifted"])
reductions = st.sampled_from(["none", "mean", "sum"])
seeds = st.integers(0, 2**20)


def holds_for(*strategies, few=10, many=MANY):
    """Makes a test of a property of drawn values, its last arguments: of ``few``, the same every
    time, or with ``-m slow`` of ``many``.

    Its other arguments are fixtures. A failure prints the smallest values that fail;
    ``--hypothesis-seed`` repeats a slow run."""

    def decorate(holds):
        names = list(inspect.signature(holds).parameters)
        fixtures = names[: len(names) - len(strategies)]

        def test(effort, **given_fixtures):
            place = next((f for name, f in given_fixtures.items() if name.endswith("place")), None)
            slowest = place is not None and (place.impl, place.device) == ("triton", "cpu")
            examples = few if effort == "few" else min(many, INTERPRETED) if slowest else many
            tried = 0

            def example(drawn):
                nonlocal tried
                tried += 1
                holds(*(given_fixtures[name] for name in fixtures), *drawn)

            # hypothesis seeds its draws by the name
            example.__qualname__ = example.__name__ = holds.__name__
            limits = settings(
                max_examples=examples,
                deadline=None,
                derandomize=effort == "few",
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            )
            # a failure shows what was drawn
            torch.set_printoptions(threshold=20, edgeitems=2)
            try:
                limits(given(st.tuples(*strategies))(example))()
            finally:
                torch.set_printoptions(profile="default")
            print(f"tried {tried}")

        test.__doc__ = holds.__doc__
        test.__name__, test.__module__ = holds.__name__, holds.__module__
        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ["effort", *fixtures]
        ]
        test.__signature__ = inspect.Signature(parameters)
        return pytest.mark.parametrize(
            "effort", ["few", pytest.param("many", marks=pytest.mark.slow)]
        )(test)

    return decorate


def parent_and_view(values: Tensor, layout: str):
    """A dense tensor, and a function that takes the part of it with these values and these strides;
    elsewhere it is NaN or no id."""
    other = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    if values.dim() == 0:
        return values.clone(), lambda t: t.view(())
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous(), lambda t: t.transpose(0, -1)
    if layout == "sliced":
        at = (..., slice(2, values.shape[-1] + 2))
        shape = (*values.shape[:-1], values.shape[-1] + 5)
    elif layout == "stepped":
        at = tuple(slice(None, None, 2) for _ in values.shape)
        shape = tuple(2 * size for size in values.shape)
    elif layout == "shifted":
        # one element from where an allocation starts
        count = values.numel()
        return torch.cat([values.new_full((1,), other), values.flatten()]), lambda t: t[
            1 : count + 1
        ].view(values.shape)
    else:
        return values.contiguous(), lambda t: t.view(t.shape)
    parent = values.new_full(shape, other)
    parent[at] = values
    return parent, lambda t: t[at]


@st.composite
def laid_out(draw, values: Tensor):
    """These values with some strides, no gradient."""
    parent, view = parent_and_view(values, draw(layouts))
    return view(parent)


class Call(NamedTuple):
    """A loss of logits (N, C, ...) or (C)."""

    parent: Tensor  # what the logits are a view of
    view: object  # its function
    target: Tensor
    weight: Tensor | None
    options: dict

    @property
    def logits(self):
        return self.view(self.parent)


@st.composite
def loss_options(draw, reduction=None):
    reduction = reduction or draw(reductions)
    options = {
        "reduction": reduction,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        # exact in float32, so that an offset common to a row stays one
        "logit_scale": draw(st.sampled_from([None, 0.5, 2.0, -1.0])),
        "lse_square_scale": draw(st.sampled_from([0.0, 1e-3])),
    }
    if reduction == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([3, 10.5]))
    # what is not given is a default
    return {name: value for name, value in options.items() if value not in (None, 0.0)}


@st.composite
def class_ids(draw, shape, v, ignore_index=-100):
    """Ids of a dtype that holds them: any, one for all, all ignored."""
    fitting = [
        torch.int64,
        torch.int32,
        *([torch.int16] if v < 2**15 else []),
        *([torch.int8] if v < 2**7 else []),
    ]
    fitting += [torch.uint8] if v < 2**8 and 0 <= ignore_index < 2**8 else []
    pattern = draw(st.sampled_from(["any", "any", "one for all", "first and last", "all ignored"]))
    ids = torch.randint(0, v, shape)
    if pattern == "one for all":
        ids = torch.full(shape, draw(st.integers(0, v - 1)))
    elif pattern == "first and last":
        ids = torch.where(torch.rand(shape) < 0.5, 0, v - 1)
    share = 1.0 if pattern == "all ignored" else draw(st.sampled_from([0.0, 0.3]))
    ids = ids.masked_fill(torch.rand(shape) < share, ignore_index)
    return ids.to(
        draw(
            st.sampled_from(
                [d for d in fitting if torch.iinfo(d).min <= ignore_index <= torch.iinfo(d).max]
            )
        )
    )


@st.composite
def probabilities(draw, shape, v, dtype):
    """(*shape, v): peaked, with zeros, one-hot, or of any mass."""
    kind = draw(st.sampled_from(["softmax", "zeros", "one-hot", "any mass"]))
    q = torch.softmax(torch.randn(*shape, v) * 3.0, -1)
    if kind == "zeros":
        q = q * (torch.rand(q.shape) < 0.5)
    elif kind == "one-hot":
        q = torch.nn.functional.one_hot(torch.randint(0, v, shape), v).float()
    elif kind == "any mass":
        q = torch.rand(q.shape)
    return q.to(dtype)


@st.composite
def calls(draw):
    """Everything cross_entropy takes."""
    torch.manual_seed(draw(seeds))
    v = draw(st.integers(1, 300))
    batch = draw(
        st.sampled_from(
            [
                (),
                (1,),
                (draw(st.integers(1, 9)),),
                (draw(st.integers(1, 3)), 2),
                (2, 1, draw(st.integers(1, 3))),
            ]
        )
    )
    dtype = draw(dtypes)
    spread = draw(st.sampled_from([0.0, 1.0, 8.0, 30.0]))
    x = torch.randn(*batch, v) * spread + draw(st.sampled_from([0.0, 0.0, 100.0, -300.0]))
    masked = torch.rand(v) < (0.3 if draw(st.booleans()) else 0.0)
    masked[-1] = False
    x = x.masked_fill(masked, -math.inf)
    soft = draw(st.booleans())
    options = draw(loss_options())
    if masked.any():
        # what a mass on a class of -inf costs is infinite, or NaN to torch; and the other way round
        # it is the largest
        options.pop("label_smoothing", None)
        if options.get("logit_scale", 1.0) < 0.0:
            options.pop("logit_scale")
    if soft:
        target = draw(
            probabilities(batch, v, draw(st.sampled_from([dtype, torch.float32])))
        ).masked_fill(masked, 0.0)
    else:
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, v]))
        target = draw(class_ids(batch, v, options["ignore_index"]))
        counts = target != options["ignore_index"]
        out = masked[target.long().clamp(0, v - 1)] & counts
        target = torch.where(out, v - 1, target).to(target.dtype)
    at = min(1, len(batch))
    x, target = x.movedim(-1, at).to(dtype), target.movedim(-1, at) if soft else target
    weight = torch.rand(v) + 0.05 if draw(st.booleans()) else None
    if weight is not None and draw(st.booleans()):
        weight = weight * (torch.rand(v) < 0.7)
    parent, view = parent_and_view(x, draw(layouts))
    return Call(parent, view, draw(laid_out(target)), weight, options)


@st.composite
def cuts(draw, v, most=4):
    """Sizes of shards of v classes, none empty."""
    marks = sorted(draw(st.sets(st.integers(1, v - 1), max_size=most - 1))) if v > 1 else []
    return [b - a for a, b in itertools.pairwise([0, *marks, v])]


@st.composite
def calls_of_ranks(draw, ranks, forms, combinations):
    """(form, (start, stop) of each rank, probabilities or ids, options by name, rows, whether ranks
    have all class weights)."""
    sizes = draw(st.lists(st.integers(0, 30), min_size=ranks, max_size=ranks).filter(any))
    starts = [0, *itertools.accumulate(sizes)]
    places = draw(st.permutations(list(itertools.pairwise(starts))))
    names = draw(st.sampled_from(combinations))
    return (
        draw(st.sampled_from(forms)),
        tuple(places),
        draw(st.booleans()),
        names,
        draw(st.integers(1, 9)),
        draw(st.booleans()),
    )


def drawn(strategy, count):
    """So many examples, the same every time, for those who try them all at once."""
    made = []

    def keep(example):
        made.append(example)

    settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
    )(given(strategy)(keep))()
    return made
