from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fedmix.batch import Batch, Term
from fedmix.errors import ConfigError, DataError
from fedmix.federation.update import REACHED_BY, group_of, tower_of
from fedmix.model.encoder import MixedModel
from fedmix.model.layers import to_patches
from fedmix.objectives.alignment import contrast_term, hard_negatives, sigmoid_contrast_term, soft_targets
from fedmix.objectives.masking import hide_patches, hide_words
from fedmix.objectives.mixture import Learner
from fedmix.objectives.reconstruction import masked_patch_term

EVERYTHING = {"mvm": 1.0, "mlm": 0.3, "contrast": 1.0, "match": 0.5, "joint_share": 0.5}

# Every choice that is off by default, at once; the sigmoid form excludes some of them.
CHOICES = EVERYTHING | {
    "anchor": 0.5,
    "soft_targets": 0.2,
    "same_patient": "left_out",
    "queue": 8,
    "joint_masking": "one_at_a_time",
    "match_negatives": "hard",
    "joint_share": 1.0,
}
SIGMOID = CHOICES | {"soft_targets": 0.0, "queue": 0, "sizes": {"contrast_form": "sigmoid"}}


@pytest.fixture
def learner() -> Learner:
    return tiny.learner(**EVERYTHING)


def only(batch: Batch, kind: str) -> Batch:
    """The studies of one kind out of a mixed batch, in its order and with its padding."""
    wanted = {"i": batch.has_image & ~batch.has_text, "t": batch.has_text & ~batch.has_image, "p": batch.is_paired}[kind]
    image = batch.image[wanted[batch.has_image]] if batch.image is not None and kind != "t" else None
    text = batch.text[wanted[batch.has_text]] if batch.text is not None and kind != "i" else None
    return Batch(image, text, batch.has_image[wanted], batch.has_text[wanted], batch.patient[wanted])


def added(parts: Iterable[dict[str, Term]]) -> dict[str, Term]:
    total: dict[str, Term] = {}
    for terms in parts:
        for name, term in terms.items():
            total[name] = total[name] + term if name in total else term
    return total


# ---- which terms


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        ("iii", {"mvm"}),
        ("ttt", {"mlm"}),
        ("it", {"mvm", "mlm"}),
        ("pppp", {"mvm", "mlm", "contrast", "match"}),
        ("pit", {"mvm", "mlm", "contrast"}),  # half of one pair is none: no joint sequence
    ],
)
def test_batch_has_the_terms_that_its_studies_allow(learner: Learner, kinds: str, names: set[str]) -> None:
    assert set(learner.terms(tiny.batch(kinds), tiny.generator())) == names


@pytest.mark.parametrize("name", ["mvm", "mlm", "contrast", "match"])
def test_term_of_weight_zero_is_not_computed(name: str) -> None:
    learner = tiny.learner(**(EVERYTHING | {name: 0.0}))
    terms = learner.terms(tiny.batch("itpppp"), tiny.generator())
    assert set(terms) == {"mvm", "mlm", "contrast", "match"} - {name}
    learner.loss(terms).backward()
    heads = {"mvm": "patch_decoder", "mlm": "word_head", "contrast": "projection", "match": "match_head"}
    assert not [parameter for parameter in tiny.touched(learner.model) if parameter.startswith(heads[name])]


def test_weights_of_the_terms_are_what_was_hidden_or_compared(learner: Learner) -> None:
    """Of 16 patches, 11 are hidden in each image alone, 6 in each pair's, 12 in each of the two joint ones."""
    terms = learner.terms(tiny.batch("iiitpppp"), tiny.generator())
    assert terms["mvm"].weight.item() == 3 * 11 + 4 * 6 + 2 * 12
    assert terms["contrast"].weight.item() == 4
    assert terms["match"].weight.item() == 2 + 1  # two pairs that belong together, and one of them crossed


def test_match_needs_two_joint_pairs() -> None:
    learner = tiny.learner(mvm=1.0, match=1.0, joint_share=0.3)
    terms = learner.terms(tiny.batch("ppp"), tiny.generator())
    assert set(terms) == {"mvm"}
    assert terms["mvm"].weight.item() == 3 * 6 + 12


# ---- a mixed batch is the sum of its parts


@pytest.mark.parametrize("kinds", ["iittpppp", "iptpitpp", "pppptti"])
def test_terms_of_a_mixed_batch_equal_the_sum_of_its_parts(learner: Learner, kinds: str) -> None:
    """Chance goes to images, reports and pairs in turn, so the parts computed with one generator hide the same."""
    batch, chance = tiny.batch(kinds), tiny.generator(5)
    expected = added(learner.terms(only(batch, kind), chance) for kind in "itp")
    found = learner.terms(batch, tiny.generator(5))
    assert set(found) == set(expected)
    for name, term in expected.items():
        torch.testing.assert_close(found[name].total, term.total, atol=1e-4, rtol=1e-5)
        assert found[name].weight == term.weight


def word_errors(net: MixedModel, tokens_BLD: Tensor, words_BL: Tensor, hidden_BL: Tensor) -> float:
    """Cross-entropy at each hidden place, one at a time."""
    log_BLV = net.word_head(tokens_BLD).log_softmax(dim=-1)
    return -sum(log_BLV[row, place, words_BL[row, place]].item() for row, place in hidden_BL.nonzero().tolist())


def test_terms_of_pairs_equal_every_reading_done_by_hand(learner: Learner) -> None:
    """Each side alone, then the first half of the pairs as joint sequences and one of these with another's report."""
    net, batch, chance = learner.model, tiny.batch("pppp"), tiny.generator(3)
    image, words = batch.image, batch.text
    assert image is not None
    assert words is not None
    found = learner.terms(batch, tiny.generator(3))

    shown, read = hide_patches(4, 16, 0.40, chance), hide_words(words, 0.15, tiny.IDS, chance)
    seen, heard = net.encode(image_BSS=image, visible_BK=shown.visible_BK), net.encode(words_BL=read.words_BL)
    shown2, read2 = hide_patches(2, 16, 0.75, chance), hide_words(words[:2], 0.50, tiny.IDS, chance)
    both = net.encode(image_BSS=image[:2], visible_BK=shown2.visible_BK, words_BL=read2.words_BL)
    crossed = net.encode(image_BSS=image[:1], visible_BK=shown2.visible_BK[:1], words_BL=read2.words_BL[1:])

    patches = to_patches(image, 8)
    mvm = masked_patch_term(net.decode_patches(seen, shown.visible_BK), patches, shown.hidden_BP, kind="multi_scale")
    mvm += masked_patch_term(net.decode_patches(both, shown2.visible_BK), patches[:2], shown2.hidden_BP, kind="multi_scale")
    mlm = word_errors(net, heard.tokens["text"], words, read.hidden_BL)
    mlm += word_errors(net, both.tokens["text"], words[:2], read2.hidden_BL)
    contrast = contrast_term(net.embed("image", seen), net.embed("text", heard), net.projection.temperature())
    right, wrong = (net.match_head(one.tokens["image"][:, 0], one.tokens["text"][:, 0]).sigmoid() for one in (both, crossed))
    match = -(right.log().sum() + (1 - wrong).log().sum())

    assert found["mvm"].total.item() == pytest.approx(mvm.total.item(), rel=1e-5)
    assert found["mlm"].total.item() == pytest.approx(mlm, rel=1e-5)
    assert found["contrast"].total.item() == pytest.approx(contrast.total.item(), rel=1e-5)
    assert found["match"].total.item() == pytest.approx(match.item(), rel=1e-5)
    assert found["mlm"].weight.item() == int(read.hidden_BL.sum() + read2.hidden_BL.sum())


@pytest.mark.parametrize("kinds", ["iii", "ttt"])
def test_term_of_one_modality_equals_its_reading_done_by_hand(learner: Learner, kinds: str) -> None:
    net, batch, chance = learner.model, tiny.batch(kinds), tiny.generator(3)
    found = learner.terms(batch, tiny.generator(3))
    if batch.image is not None:
        shown = hide_patches(3, 16, 0.70, chance)
        predicted = net.decode_patches(net.encode(image_BSS=batch.image, visible_BK=shown.visible_BK), shown.visible_BK)
        expected = masked_patch_term(predicted, to_patches(batch.image, 8), shown.hidden_BP, kind="multi_scale").total.item()
    else:
        assert batch.text is not None
        read = hide_words(batch.text, 0.25, tiny.IDS, chance)
        expected = word_errors(net, net.encode(words_BL=read.words_BL).tokens["text"], batch.text, read.hidden_BL)
    assert next(iter(found.values())).total.item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_the_weighted_sum_of_the_means(learner: Learner) -> None:
    terms = {"mvm": Term(torch.tensor(8.0), torch.tensor(4.0)), "mlm": Term(torch.tensor(5.0), torch.tensor(0.5))}
    assert learner.loss(terms).item() == pytest.approx(1.0 * 2.0 + 0.3 * 10.0)


def test_gradient_of_a_mixed_batch_is_that_of_its_terms(learner: Learner) -> None:
    terms = learner.terms(tiny.batch("iittpppp"), tiny.generator())
    learner.loss(terms).backward()
    found = {name: parameter.grad for name, parameter in learner.model.named_parameters()}
    learner.model.zero_grad()
    again = learner.terms(tiny.batch("iittpppp"), tiny.generator())
    weights = {"mvm": 1.0, "mlm": 0.3, "contrast": 1.0, "match": 0.5}
    torch.autograd.backward([weights[name] * term.total / term.weight for name, term in again.items()])
    for name, parameter in learner.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


# ---- absent means absent


@pytest.mark.parametrize("experts", [True, False], ids=["experts", "shared"])
@pytest.mark.parametrize(("kinds", "present"), [("iii", "image"), ("ttt", "text")])
def test_no_gradient_flows_to_or_from_an_absent_modality(kinds: str, present: str, experts: bool) -> None:
    learner = tiny.learner(**EVERYTHING, sizes={"modality_experts": experts})
    learner.loss(learner.terms(tiny.batch(kinds), tiny.generator())).backward()
    parts = {"image": ("embed_image", "patch_decoder"), "text": ("embed_text", "word_head")}
    other = "text" if present == "image" else "image"
    touched = tiny.touched(learner.model)
    assert not [
        name for name in touched if name.startswith((*parts[other], "projection", "match_head")) or f".{other}." in name
    ]
    assert [name for name in touched if name.startswith(parts[present])]


@pytest.mark.parametrize("kinds", ["i", "t", "p", "ip", "tp", "it", "itpp"])
def test_no_mix_of_streams_gives_nan(learner: Learner, kinds: str) -> None:
    terms = learner.terms(tiny.batch(kinds), tiny.generator())
    loss = learner.loss(terms)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in learner.model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("choices", [CHOICES, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(("kinds", "stream"), [("iii", "image"), ("ttt", "text"), ("pppp", "paired")])
def test_choices_send_gradients_where_their_stream_reaches_and_nowhere_else(
    kinds: str, stream: str, choices: dict[str, Any]
) -> None:
    learner = tiny.learner(**choices).at_round_start()
    for seed in range(2):  # the second step has a past
        learner.loss(learner.terms(tiny.batch(kinds, seed), tiny.generator(seed))).backward()
    names = {name for name, _ in learner.model.named_parameters()}
    assert tiny.touched(learner.model) == {name for name in names if stream in REACHED_BY[tower_of(group_of(name))]}


@pytest.mark.parametrize("choices", [CHOICES, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("kinds", ["i", "t", "p", "ip", "tp", "it", "itpp", "iittppppp"])
def test_choices_give_no_nan_for_any_mix_of_streams(kinds: str, choices: dict[str, Any]) -> None:
    learner = tiny.learner(**choices).at_round_start()
    for seed in range(2):
        loss = learner.loss(learner.terms(tiny.batch(kinds, seed), tiny.generator(seed)))
        loss.backward()
        assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in learner.model.parameters() if parameter.grad is not None)


def test_report_without_words_gives_zero_and_no_nan(learner: Learner) -> None:
    """A report of the summary token alone has nothing to hide."""
    batch = Batch(None, torch.tensor([[tiny.SUMMARY, 0, 0]]), torch.tensor([False]), torch.tensor([True]))
    loss = learner.loss(learner.terms(batch, tiny.generator()))
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.isfinite().all() for parameter in learner.model.parameters() if parameter.grad is not None)


def test_batch_that_no_objective_applies_to_is_refused_with_what_to_do() -> None:
    learner = tiny.learner(mlm=1.0)
    with pytest.raises(ConfigError, match=r"no objective of this stage applies .* give mvm \(images\)"):
        learner.loss(learner.terms(tiny.batch("ii"), tiny.generator()))


# ---- chance


def test_generator_decides_the_terms(learner: Learner) -> None:
    batch = tiny.batch("iittpppp")
    one, again, other = (learner.terms(batch, tiny.generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name].total, again[name].total) for name in one)
    assert not torch.equal(one["mvm"].total, other["mvm"].total)


def test_nothing_but_the_generator_is_used(learner: Learner) -> None:
    before = torch.get_rng_state()
    learner.terms(tiny.batch("iittpppp"), tiny.generator())
    assert torch.equal(torch.get_rng_state(), before)


# ---- what a pair teaches


def test_contrast_compares_each_image_with_its_own_report() -> None:
    """Crossing the reports of a batch changes the contrast and not what the images alone teach."""
    learner = tiny.learner(mvm=1.0, mlm=0.3, contrast=1.0)
    batch = tiny.batch("pppp")
    assert batch.text is not None
    crossed = Batch(batch.image, batch.text.roll(1, dims=0), batch.has_image, batch.has_text)
    terms, other = (learner.terms(one, tiny.generator()) for one in (batch, crossed))
    assert torch.equal(terms["mvm"].total, other["mvm"].total)
    assert (terms["contrast"].total - other["contrast"].total).abs() > 1e-4


def test_soft_targets_come_from_whole_reports_as_the_round_start_model_reads_them() -> None:
    """The model has moved on since; what it was is what says which reports are alike."""
    learner = tiny.learner(contrast=1.0, soft_targets=0.3, soft_temperature=0.2).at_round_start()
    batch = tiny.batch("tpppp")
    for parameter in learner.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=tiny.generator(1))
    found = learner.terms(batch, tiny.generator())["contrast"].total

    net, chance = learner.model, tiny.generator()
    words = batch.text[batch.is_paired[batch.has_text]]
    seen = net.encode(image_BSS=batch.image, visible_BK=hide_patches(4, 16, 0.40, chance).visible_BK)
    read = net.encode(words_BL=hide_words(words, 0.15, tiny.IDS, chance).words_BL)
    totals = [
        contrast_term(
            net.embed("image", seen),
            net.embed("text", read),
            net.projection.temperature(),
            target_BB=soft_targets(source.encode_text(words), share=0.3, temperature=0.2),
        ).total.item()
        for source in (tiny.model(), net)
    ]
    assert found.item() == pytest.approx(totals[0], rel=1e-5)
    assert abs(totals[0] - totals[1]) > 1e-3


def test_round_start_copy_is_made_where_it_is_needed_and_takes_no_gradient() -> None:
    assert tiny.learner(**EVERYTHING).at_round_start().start is None
    learner = tiny.learner(contrast=1.0, soft_targets=0.2).at_round_start()
    learner.loss(learner.terms(tiny.batch("pppp"), tiny.generator())).backward()
    assert learner.start is not None
    assert learner.start is not learner.model
    assert not tiny.touched(learner.start)


def test_other_study_of_the_patient_is_no_negative_where_left_out() -> None:
    """Among studies of other kinds, too: patients are looked up by study, not by pair."""
    everyone_differs, two_alike = (
        tiny.batch("ippptp", patients=patients) for patients in ((9, 1, 2, 3, 9, 4), (9, 1, 2, 3, 9, 1))
    )
    learner = tiny.learner(contrast=1.0, same_patient="left_out")
    plain = tiny.learner(contrast=1.0).terms(two_alike, tiny.generator())["contrast"].total
    assert torch.equal(learner.terms(everyone_differs, tiny.generator())["contrast"].total, plain)
    assert learner.terms(two_alike, tiny.generator())["contrast"].total < plain - 0.1


def test_leaving_patients_out_of_a_batch_that_knows_none_is_refused() -> None:
    batch = tiny.batch("pp")
    with pytest.raises(DataError, match=r"same_patient = left_out needs to know which studies are of one patient"):
        tiny.learner(contrast=1.0, same_patient="left_out").terms(replace(batch, patient=None), tiny.generator())


def test_sigmoid_form_adds_a_bias_and_moves_nothing_else() -> None:
    """The default model has the parameters it had, and the sigmoid one starts from the same values."""
    plain, other = (tiny.parameters_of(tiny.model(contrast_form=form)) for form in ("softmax", "sigmoid"))
    assert set(other) - set(plain) == {"projection.contrast_bias.weight"}
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_sigmoid_form_trains_its_bias_and_is_the_term_done_by_hand() -> None:
    learner, batch, chance = (
        tiny.learner(contrast=1.0, sizes={"contrast_form": "sigmoid"}),
        tiny.batch("pppp"),
        tiny.generator(),
    )
    found = learner.terms(batch, tiny.generator())["contrast"]
    net = learner.model
    seen = net.encode(image_BSS=batch.image, visible_BK=hide_patches(4, 16, 0.40, chance).visible_BK)
    read = net.encode(words_BL=hide_words(batch.text, 0.15, tiny.IDS, chance).words_BL)
    expected = sigmoid_contrast_term(net.embed("image", seen), net.embed("text", read), torch.tensor(0.1), torch.tensor(-10.0))
    torch.testing.assert_close(found.total, expected.total)
    found.mean().backward()
    assert net.projection.contrast_bias.weight.grad.abs() > 1e-3


def test_hard_mismatches_are_of_the_whole_batch_and_read_as_hidden_as_the_right_reports() -> None:
    """Two of eight pairs are joint, and the first is given the wrong report that was drawn for it among all eight."""
    learner = tiny.learner(contrast=1.0, match=1.0, joint_share=0.25, match_negatives="hard")
    net, batch, outside = learner.model, tiny.batch("pppppppp"), 0
    for seed in range(6):
        chance = tiny.generator(seed)
        found = learner.terms(batch, tiny.generator(seed))["match"]
        seen = net.encode(image_BSS=batch.image, visible_BK=hide_patches(8, 16, 0.40, chance).visible_BK)
        heard = net.encode(words_BL=hide_words(batch.text, 0.15, tiny.IDS, chance).words_BL)
        logits = net.embed("image", seen) @ net.embed("text", heard).T / net.projection.temperature()
        wrong = hard_negatives(logits, chance)[:1]
        shown, read = hide_patches(2, 16, 0.75, chance).visible_BK, hide_words(batch.text[:2], 0.50, tiny.IDS, chance).words_BL
        misread = hide_words(batch.text[wrong], 0.50, tiny.IDS, chance).words_BL
        both = net.encode(image_BSS=batch.image[:2], visible_BK=shown, words_BL=read)
        crossed = net.encode(image_BSS=batch.image[:1], visible_BK=shown[:1], words_BL=misread)
        right, no = (net.match_head(one.tokens["image"][:, 0], one.tokens["text"][:, 0]).sigmoid() for one in (both, crossed))
        assert found.total.item() == pytest.approx(-(right.log().sum() + (1 - no).log().sum()).item(), rel=1e-4)
        assert found.weight.item() == 3
        outside += int(wrong.item() >= 2)
    assert outside >= 1


def test_hard_mismatch_within_one_patient_is_left_out() -> None:
    objectives = {"contrast": 1.0, "match": 1.0, "joint_share": 1.0, "match_negatives": "hard", "same_patient": "left_out"}
    two, none = (
        tiny.learner(**objectives).terms(tiny.batch("pppp", patients=patients), tiny.generator())
        for patients in ((5, 5, 5, 6), (5, 5, 5, 5))
    )
    assert two["match"].weight.item() == 4 + 2
    assert "match" not in none  # only right pairs would teach to say yes
    assert none["contrast"].total == 0


# ---- one side hidden, the other whole


def test_one_at_a_time_equals_both_readings_done_by_hand() -> None:
    """Of four joint pairs two show the whole report and hide patches, two show the whole image and hide words."""
    learner = tiny.learner(mvm=1.0, mlm=1.0, match=1.0, joint_share=1.0, joint_masking="one_at_a_time")
    net, batch, chance = learner.model, tiny.batch("pppp"), tiny.generator(3)
    image, words = batch.image, batch.text
    found = learner.terms(batch, tiny.generator(3))

    shown, read = hide_patches(4, 16, 0.40, chance), hide_words(words, 0.15, tiny.IDS, chance)
    seen, heard = net.encode(image_BSS=image, visible_BK=shown.visible_BK), net.encode(words_BL=read.words_BL)
    torch.randint(2, (1,), generator=chance)
    part = hide_patches(2, 16, 0.75, chance).visible_BK
    hidden_BP = torch.ones(2, 16, dtype=torch.bool).scatter_(1, part, False)
    told = net.encode(image_BSS=image[:2], visible_BK=part, words_BL=words[:2])
    told_wrong = net.encode(image_BSS=image[:1], visible_BK=part[:1], words_BL=words[1:2])
    read2 = hide_words(words[2:], 0.50, tiny.IDS, chance)
    drawn = net.encode(image_BSS=image[2:], words_BL=read2.words_BL)
    drawn_wrong = net.encode(image_BSS=image[2:3], words_BL=read2.words_BL[1:])

    patches = to_patches(image, 8)
    mvm = masked_patch_term(net.decode_patches(seen, shown.visible_BK), patches, shown.hidden_BP, kind="multi_scale")
    mvm += masked_patch_term(net.decode_patches(told, part), patches[:2], hidden_BP, kind="multi_scale")
    mlm = word_errors(net, heard.tokens["text"], words, read.hidden_BL)
    mlm += word_errors(net, drawn.tokens["text"], words[2:], read2.hidden_BL)
    match = 0.0
    for encoded, right in ((told, True), (told_wrong, False), (drawn, True), (drawn_wrong, False)):
        yes_B = net.match_head(encoded.tokens["image"][:, 0], encoded.tokens["text"][:, 0]).sigmoid()
        match -= (yes_B if right else 1 - yes_B).log().sum().item()

    assert found["mvm"].total.item() == pytest.approx(mvm.total.item(), rel=1e-5)
    assert found["mvm"].weight.item() == 4 * 6 + 2 * 12
    assert found["mlm"].total.item() == pytest.approx(mlm, rel=1e-5)
    assert found["mlm"].weight.item() == int(read.hidden_BL.sum() + read2.hidden_BL.sum())
    assert found["match"].total.item() == pytest.approx(match, rel=1e-5)
    assert found["match"].weight.item() == 6


def test_odd_pair_goes_to_either_side_by_chance() -> None:
    """Three pairs hide 6 patches each alone; the one joint pair hides 12, or none and words instead."""
    learner = tiny.learner(mvm=1.0, joint_share=0.3, joint_masking="one_at_a_time")
    weights = {learner.terms(tiny.batch("ppp"), tiny.generator(seed))["mvm"].weight.item() for seed in range(8)}
    assert weights == {3 * 6, 3 * 6 + 12}


# ---- each objective can be learned: 8 studies, one fixed mask, 150 steps


@pytest.mark.parametrize(
    ("kind", "objectives", "bound"),
    [
        pytest.param("i", {"mvm": 1.0, "hide_image_alone": 0.5}, 0.1, id="mvm (the mean image errs by 1.23)"),
        pytest.param("t", {"mlm": 1.0}, 0.05, id="mlm (a guess costs ln 45 = 3.81)"),
        pytest.param("p", {"contrast": 1.0, "hide_image_paired": 0.1}, 0.02, id="contrast (a guess costs ln 8 = 2.08)"),
        pytest.param(
            "p",
            {"contrast": 1.0, "hide_image_paired": 0.1, "soft_targets": 0.1, "soft_temperature": 0.02},
            0.6,
            id="contrast with soft targets (a guess costs ln 8 = 2.08; what is left is the targets' own spread)",
        ),
        pytest.param(
            "p",
            {"contrast": 1.0, "hide_image_paired": 0.1, "queue": 16, "same_patient": "left_out"},
            0.05,
            id="contrast with a queue (a guess costs ln 22 = 3.09)",
        ),
        pytest.param(
            "p",
            {"contrast": 1.0, "hide_image_paired": 0.1, "sizes": {"contrast_form": "sigmoid"}},
            0.8,
            id="sigmoid contrast (knowing that one in eight belongs costs 3.01; cosines of 1 under the first bias ln 2)",
        ),
        pytest.param(
            "p",
            {"contrast": 1.0, "hide_image_paired": 0.1, "sizes": {"contrast_form": "margin"}},
            0.01,
            id="margin contrast (a guess costs .35: seven wrong sides of eight, each way, half of both)",
        ),
        pytest.param(
            "p",
            {
                "match": 1.0,
                "contrast": 0.01,
                "match_negatives": "hard",
                "joint_share": 1.0,
                "hide_image_joint": 0.3,
                "hide_text_joint": 0.2,
            },
            0.05,
            id="match with hard negatives (a guess costs ln 2 = .69)",
        ),
        pytest.param(
            "p",
            {"mvm": 1.0, "mlm": 1.0, "joint_share": 1.0, "joint_masking": "one_at_a_time"},
            0.1,
            id="one side of a pair at a time (the mean image and a guess cost 1.23 + 3.81)",
        ),
        pytest.param(
            "p",
            {"match": 1.0, "joint_share": 1.0, "hide_image_joint": 0.3, "hide_text_joint": 0.2},
            0.02,
            id="match (a guess costs ln 2 = .69)",
        ),
    ],
)
def test_objective_overfits_eight_studies(kind: str, objectives: dict[str, Any], bound: float) -> None:
    learner, batch = tiny.learner(**objectives).at_round_start(), tiny.batch(8 * kind)
    optimiser = torch.optim.AdamW(learner.model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(150):
        optimiser.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 20) * (1 - step / 155)
        loss = learner.loss(learner.terms(batch, tiny.generator()))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss.item() < bound
