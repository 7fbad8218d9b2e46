"""Joint tuning: its loss, its schedule, and what it leaves alone."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from toys import CLASSES, calls, forget_calls, map_chain, random_batches, same_state, snapshot, three_chains

from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.families.anchors import Family
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning import objective, tuner
from klas_zoo.tuning import settings as tuning
from klas_zoo.tuning.objective import mixed_loss
from klas_zoo.tuning.settings import PRESETS, TuningSettings
from klas_zoo.tuning.tuner import Progress, tune

ROUTES = [
    Route.anchor("tiny", 3),
    Route.anchor("small", 4),
    Route.anchor("base", 5),
    Route.stitch("tiny", 2, "small", 1, 4),
    Route.stitch("small", 2, "base", 3, 5),
]
SETTINGS = TuningSettings(
    steps=10, epochs=1, batch=8, anchor_rate=1e-3, stitch_rate=1e-2, weight_decay=0.1, warmup=0.2, distillation=0.6,
    hard=False, clip=None, augmentation="light", init_images=8, precision="fp32", seed=3,
)  # fmt: skip


def settings(**changes: Any) -> TuningSettings:
    return replace(SETTINGS, **changes)


def supernet(routes: list[Route] = ROUTES) -> Supernet:
    torch.manual_seed(7)
    return Supernet(three_chains(), routes).eval()


def endless() -> Iterator[Batch]:
    return cycle(random_batches((8, 8, 8)))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """What AdamW was given at every step: its groups, with the norm of their gradients."""
    steps: list[list[dict[str, Any]]] = []

    class Recording(torch.optim.AdamW):
        def step(self, *arguments: Any, **named: Any) -> Any:
            steps.append(
                [
                    {
                        "params": group["params"],
                        "lr": group["lr"],
                        "weight_decay": group["weight_decay"],
                        "norm": sum(p.grad.norm().item() ** 2 for p in group["params"] if p.grad is not None) ** 0.5,
                    }
                    for group in self.param_groups
                ]
            )
            return super().step(*arguments, **named)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    return steps


def test_no_steps_change_nothing_and_take_no_images() -> None:
    net = supernet()
    before = snapshot(net)
    tune(net, iter([]), 0, SETTINGS)
    assert same_state(net, before)
    assert not net.training


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    one, same, other = supernet(), supernet(), supernet()
    tune(one, endless(), 6, SETTINGS)
    tune(same, endless(), 6, SETTINGS)
    tune(other, endless(), 6, settings(seed=4))
    assert same_state(one, snapshot(same))
    assert not same_state(one, snapshot(other))


def test_a_step_is_that_of_adamw_on_the_mixed_loss() -> None:
    """One route, tuned by hand beside it."""
    route = ROUTES[4]
    net = supernet([ROUTES[2], route])
    net.routes = (route,)
    byhand = copy.deepcopy(net)
    teacher = copy.deepcopy(net.chain("base"))
    wanted = settings(warmup=0.0, weight_decay=0.0, anchor_rate=0.01, stitch_rate=0.01)
    tune(net, endless(), 3, wanted)

    optimiser = torch.optim.AdamW(byhand.parameters(), lr=0.01, weight_decay=0.0)
    stream = endless()
    for factor in (1.0, 0.75, 0.25):  # half a cosine over three steps: ½ (1 + cos(π k/3))
        images, labels = next(stream)
        optimiser.param_groups[0]["lr"] = 0.01 * factor
        loss = mixed_loss(byhand.network(route)(images), labels, teacher(images).detach(), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, tensor in net.state_dict().items():
        assert torch.allclose(tensor, byhand.state_dict()[name], atol=1e-6), name


def test_every_step_draws_one_route_and_all_are_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    net = supernet()
    drawn: list[Route] = []

    def forward(images: Tensor, route: Route) -> Tensor:
        drawn.append(route)
        return net.chain("tiny")(images)

    monkeypatch.setattr(net, "forward", forward)
    tune(net, endless(), 500, SETTINGS)
    assert len(drawn) == 500
    counts = Counter(drawn)
    assert set(counts) == set(ROUTES)
    assert all(70 < count < 130 for count in counts.values())  # 100 each, ± 3.4 standard deviations
    again = random.Random(SETTINGS.seed)
    assert drawn[:20] == [again.choice(ROUTES) for _ in range(20)]


def test_the_teacher_is_the_largest_anchor_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = supernet().train()
    net.chain("base").blocks[0].append(nn.Dropout(0.5))
    before = copy.deepcopy(net.chain("base")).eval()
    seen = []

    def watched(logits: Tensor, labels: Tensor, taught: Tensor, wanted: TuningSettings) -> Tensor:
        assert not taught.requires_grad
        seen.append(taught)
        return mixed_loss(logits, labels, taught, wanted)

    monkeypatch.setattr(objective, "mixed_loss", watched)
    tune(net, endless(), 6, settings(anchor_rate=0.1))
    with torch.no_grad():
        expected = [before(images) for images, _ in random_batches((8, 8, 8))] * 2
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(seen, expected, strict=True))
        images = random_batches((8,))[0][0]
        assert not torch.allclose(net.chain("base")(images), before(images), atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("hard", [True, False])
def test_the_loss_is_a_mix_of_labels_and_teacher(hard: bool, share: float) -> None:
    generator = np.random.default_rng(0)
    logits, taught = generator.normal(size=(2, 6, CLASSES)) * 2
    labels = generator.integers(0, CLASSES, 6)
    total = 0.0
    for z, t, y in zip(logits, taught, labels, strict=True):
        q, p = np.exp(z) / np.exp(z).sum(), np.exp(t) / np.exp(t).sum()
        distilled = -math.log(q[t.argmax()]) if hard else float((p * np.log(p / q)).sum())
        total += (1 - share) * -math.log(q[y]) + share * distilled
    loss = mixed_loss(
        torch.tensor(logits), torch.tensor(labels), torch.tensor(taught), settings(hard=hard, distillation=share)
    )
    assert loss.item() == pytest.approx(total / 6)


@pytest.mark.parametrize(
    ("steps", "warmup", "factors"),
    [
        (8, 0.25, [1 / 3, 2 / 3, *((1 + math.cos(math.pi * k / 6)) / 2 for k in range(6))]),
        (4, 0.0, [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        (3, 1.0, [0.25, 0.5, 0.75]),
        (1, 0.1, [1 / 1.1]),
    ],
    ids=["warm-up and cosine", "cosine alone", "warm-up alone", "a single step"],
)
def test_rates_rise_in_a_line_and_fall_in_a_cosine(
    recorded: list[list[dict[str, Any]]], steps: int, warmup: float, factors: list[float]
) -> None:
    net = supernet()
    tune(net, endless(), steps, settings(warmup=warmup))
    anchors = {id(p) for p in net.chains.parameters()}
    for groups, factor in zip(recorded, factors, strict=True):
        for group in groups:
            peak = 1e-3 if id(group["params"][0]) in anchors else 1e-2
            assert group["lr"] == pytest.approx(peak * factor)


def test_every_weight_is_tuned_at_the_rate_of_its_part_and_only_matrices_decay(
    recorded: list[list[dict[str, Any]]], tiny_family: Family
) -> None:
    net = Supernet(tiny_family.chains, [Route.stitch("half", 2, "float", 1, 4)])
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    tune(net, cycle([(images, labels)]), 1, settings(warmup=0.0))
    names = {id(p): name for name, p in net.named_parameters()}
    found = {names.pop(id(p)): (group["lr"], group["weight_decay"]) for group in recorded[0] for p in group["params"]}
    assert not names  # every parameter, once
    for name, (rate, decay) in found.items():
        assert rate == (1e-2 if name.startswith("stitches.") else 1e-3), name
        flat = name.endswith(("bias", "pos_embed", "cls_token")) or ".norm" in name
        assert decay == (0.0 if flat else 0.1), name
    decayed = {
        name.partition("stem.")[2] or name.partition("head.")[2] or name
        for name, (_, decay) in found.items() if decay
    }  # fmt: skip
    assert {"patch_embed.proj.weight", "head.weight"} < decayed
    assert sum("blocks.0" in name for name in decayed) == 3 * 4  # qkv, proj, fc1, fc2 of three anchors


def test_a_rate_of_zero_leaves_the_anchors_as_they_are() -> None:
    net = supernet()
    anchors, stitches = snapshot(net.chains), snapshot(net.stitches)
    tune(net, endless(), 10, settings(anchor_rate=0.0))
    assert same_state(net.chains, anchors)
    assert not same_state(net.stitches, stitches)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_are_no_longer_than_the_clip(recorded: list[list[dict[str, Any]]], clip: float | None) -> None:
    tune(supernet(), endless(), 8, settings(clip=clip))
    norms = [sum(group["norm"] ** 2 for group in groups) ** 0.5 for groups in recorded]
    if clip is None:
        assert min(norms) > 0.05
    else:
        assert norms == pytest.approx([clip] * 8, rel=1e-3)


def test_anchors_train_but_their_statistics_stand_still() -> None:
    torch.manual_seed(0)
    chains = {"tiny": map_chain(norm=True), "small": map_chain((5, 5, 9, 9), seed=1, norm=True)}
    net = Supernet(chains, [Route.anchor("tiny", 3), Route.stitch("tiny", 1, "small", 1, 3)]).eval()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    weights = snapshot(net.chain("tiny"))
    tune(net, endless(), 6, SETTINGS)
    assert len(before) == 18
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert not same_state(net.chain("tiny"), weights)
    assert net.chain("tiny").blocks[0][-1].training_seen == {False, True}
    assert not any(part.training for part in net.modules())


@pytest.mark.parametrize("step", [1, 3])
def test_a_loss_that_is_not_finite_names_the_route_and_the_step(step: int) -> None:
    net = supernet([Route.stitch("tiny", 2, "small", 1, 4)])
    batches = random_batches((8,) * step)
    batches[-1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(SelectionError) as caught:
        tune(net, iter(batches), 5, SETTINGS)
    assert str(caught.value) == (
        f"Tuning diverged at step {step} on route tiny.1-2+small.2-4: lower the learning rates."
    )


def test_progress_tells_a_running_mean_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, told = [], []

    def watched(*arguments: Any) -> Tensor:
        loss = mixed_loss(*arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(objective, "mixed_loss", watched)
    tune(supernet(), endless(), 3, SETTINGS, on_step=told.append)
    second = 0.95 * losses[0] + 0.05 * losses[1]
    means = [losses[0], second, 0.95 * second + 0.05 * losses[2]]
    factors = (1 / 1.6, *((1 + math.cos(math.pi * (k - 0.6) / 2.4)) / 2 for k in (1, 2)))
    rates = [1e-2 * factor for factor in factors]
    assert told == [
        Progress(
            step=k + 1, steps=3, loss=pytest.approx(means[k]), last=losses[k], rate=pytest.approx(rates[k]), images=8
        )
        for k in range(3)
    ]


def test_tuning_lowers_the_loss_of_every_route() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (64,), generator=generator)
    colours = torch.randn(CLASSES, 3, generator=generator)
    images = colours[labels][:, :, None, None] + 0.2 * torch.randn(64, 3, 8, 8, generator=generator)
    net = supernet()

    def losses() -> list[float]:
        with torch.no_grad():
            return [nn.functional.cross_entropy(net(images, route), labels).item() for route in net.routes]

    before = losses()
    tune(net, cycle([(images, labels)]), 200, settings(anchor_rate=3e-2, distillation=0.0))
    after = losses()
    assert all(late < 0.6 * early for early, late in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("steps", "epochs", "images", "expected"), [(7, 3, 100, 7), (0, 3, 100, 0), (None, 3, 100, 36), (None, 3, 5, 3)]
)
def test_steps_are_said_or_follow_from_epochs(steps: int | None, epochs: int, images: int, expected: int) -> None:
    assert settings(steps=steps, epochs=epochs, batch=8).total_steps(images) == expected


@pytest.mark.parametrize(("fast", "meant"), [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_is_bf16_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, fast: bool, meant: str
) -> None:
    monkeypatch.setattr(tuning, "has_fast_bf16", lambda device: fast)
    assert settings(precision="auto").on("cpu").precision == meant
    assert settings(precision="fp32").on("cpu").precision == "fp32"


def test_bf16_rounds_products_and_leaves_weights_in_fp32() -> None:
    ends = {}
    for precision in ("fp32", "bf16"):
        net = supernet()
        tune(net, endless(), 3, settings(precision=precision))
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        ends[precision] = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert not torch.equal(ends["fp32"], ends["bf16"])
    # Adam turns a rounding that flips a tiny gradient's sign into a whole step: few weights, not most
    assert (ends["fp32"] - ends["bf16"]).abs().mean() < 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_runs_in_parts_while_bf16_steps_are_taken_on_a_cpu(tiny_family: Family, precision: Any) -> None:
    chains = tiny_family.chains
    net = Supernet(chains, [Route.anchor(name, chain.depth) for name, chain in chains.items()])
    tuning_run = tuner.Tuner(net, 1, settings(precision=precision))

    def fused() -> set[bool]:
        networks = (net, tuning_run.objective.teacher)
        return {m.fused_attn for one in networks for m in one.modules() if isinstance(m, Attention)}

    with tuning_run.running():
        assert fused() == {precision == "fp32"}
    assert fused() == {True}


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_hold_what_can_be_tuned_with(name: str) -> None:
    preset = PRESETS[name]
    assert 0 <= preset.distillation <= 1 and 0 <= preset.warmup <= 1
    assert preset.clip is None or preset.clip > 0
    assert preset.total_steps(4_000) > 0
    net = supernet()
    tune(net, endless(), 2, preset)
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("own", [{}, {"own_norms": True}, {"rank": 2}])
def test_frozen_anchors_do_not_change_and_no_step_is_spent_on_them(own: dict[str, Any]) -> None:
    net = supernet()
    anchors, stitches = snapshot(net.chains), snapshot(net.stitches)
    drawn: list[Route] = []
    one = tuner.Tuner(net, 6, settings(anchors="frozen", **own))
    with one.running():
        for _ in range(6):
            drawn += one._next_routes()
            one.step(endless())
    one.finish()
    assert same_state(net.chains, anchors)
    assert not same_state(net.stitches, stitches)
    assert not any(route.is_anchor for route in drawn)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_routes_own_updates_learn() -> None:
    net = supernet()
    tune(net, endless(), 12, settings(anchors="frozen", rank=2))
    ups = [value for name, value in net.own.named_parameters() if name.endswith("up")]
    assert ups
    assert all(value.any() for value in ups)


def test_tuning_with_tensors_of_each_routes_own_resumes_bit_for_bit() -> None:
    chosen = settings(own_norms=True, rank=2, sampling="gain")
    whole, first, second = supernet(), supernet(), supernet()
    images = random_batches((8,) * 8)
    tune(whole, iter(images), 8, chosen)
    one = tuner.Tuner(first, 8, chosen)
    with one.running():
        for _ in range(4):
            one.step(iter([images[one.done]]))
    state = copy.deepcopy(one.state())
    other = tuner.Tuner(second, 8, chosen)
    other.restore(state)
    with other.running():
        while other.done < 8:
            other.step(iter([images[other.done]]))
    other.finish()
    assert same_state(second, snapshot(whole))


def test_the_distance_of_features_is_none_for_an_exact_copy_and_draws_a_stitch_to_its_target() -> None:
    net = supernet([Route.anchor("base", 5), ROUTES[4]])
    one = tuner.Tuner(net, 30, settings(features=1.0, anchors="frozen", distillation=0.0))
    images, labels = random_batches((8,))[0]
    target = net.chain("base")
    *_, features = target.walk(images)
    assert one.objective.distance(features, images, "base").item() == pytest.approx(0, abs=1e-6)
    before = _feature_distance(one, images)
    with one.running():
        for _ in range(30):
            one.step(iter([(images, labels)]))
    assert _feature_distance(one, images) < before


def _feature_distance(one: tuner.Tuner, images: Tensor) -> float:
    features = images
    with torch.no_grad():
        for step in one.supernet.steps(ROUTES[4])[:-1]:
            features = one.supernet.module(step)(features)
        return float(one.objective.distance(features, images, "base"))


def test_soft_distillation_at_a_temperature_is_times_its_square() -> None:
    torch.manual_seed(0)
    logits, taught, labels = torch.randn(6, CLASSES), torch.randn(6, CLASSES), torch.arange(6) % CLASSES
    found = mixed_loss(logits, labels, taught, settings(distillation=1.0, temperature=3.0))
    p, q = (torch.softmax(one / 3, 1) for one in (taught, logits))
    assert found.item() == pytest.approx(9 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-5)


def test_another_teacher_takes_the_largest_anchors_place() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES)).requires_grad_(False)
    net = supernet()
    one = tuner.Tuner(net, 1, settings(distillation=1.0), teacher=teacher)
    images, labels = random_batches((8,))[0]
    loss = one.objective(images, labels, one.objective.taught(images), ROUTES[0])
    expected = mixed_loss(net(images, ROUTES[0]), labels, teacher(images), settings(distillation=1.0))
    assert loss.item() == pytest.approx(expected.item())


def test_steps_on_a_batch_used_again_are_those_on_two_alike_and_the_teacher_answers_it_once() -> None:
    one, two, three = random_batches((8, 8, 8))
    often, again = supernet(), supernet()
    tune(often, iter([one, one, two, two, three]), 5, settings(sampling="gain"))
    wanted = settings(sampling="gain", reuse=2)
    teacher = copy.deepcopy(again.chain("base")).requires_grad_(False)
    run = tuner.Tuner(again, 5, wanted, teacher=teacher)
    forget_calls(teacher)
    told, stream, taken = [], iter([one, two, three]), []
    with run.running():
        while run.done < 5:
            told.append(run.step(stream).images)
            taken.append(run.batches_taken)
    run.finish()
    assert same_state(often, snapshot(again))
    assert calls(teacher) == [3] * 5
    assert told == [8] * 5
    assert taken == [0, 1, 1, 2, 2]
    assert list(stream) == []


def test_all_parts_of_a_batch_are_used_again() -> None:
    parts = random_batches((4, 4, 4, 4))
    often, again = supernet(), supernet()
    tune(often, iter([*parts[:2], *parts[:2], *parts[2:], *parts[2:]]), 4, settings(accumulate=2))
    tune(again, iter(parts), 4, settings(accumulate=2, reuse=2))
    assert same_state(often, snapshot(again))


def test_epochs_count_what_is_used_again() -> None:
    assert settings(steps=None, epochs=3, batch=8).total_steps(33) == 12
    assert settings(steps=None, epochs=3, batch=8, reuse=2).total_steps(33) == 24
    assert settings(steps=7, reuse=2).total_steps(33) == 7
