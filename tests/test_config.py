"""What a user types, and what the program says back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmix import config
from fedmix.config.model import SIZES
from fedmix.errors import ConfigError

MINIMAL = """
name: demo
data:
  sites:
    - {name: north, stream: image, phantom: {studies: 10, look: north}}
    - {name: south, stream: text, shard: /data/south}
    - {name: west, stream: paired, phantom: {studies: 10, look: west}}
  held_out: {phantom: {studies: 10, look: unseen}}
stages:
  - {name: unpaired, rounds: 2, streams: [image, text]}
  - {name: paired, rounds: 3, streams: [paired], objectives: {contrast: 1.0}}
"""


def parse(*overrides: str, text: str = MINIMAL) -> config.Experiment:
    return config.parse(text, overrides)


def values_of(experiment: config.Experiment, path: str) -> Any:
    node: Any = experiment.model_dump()
    for key in path.split("."):
        node = node[int(key)] if key.isdecimal() else node[key]
    return node


# ---- keys and values that are wrong


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("model.widht=64", "unknown key 'model.widht'; did you mean 'width'?"),
        ("stages.paired.local_step=5", "did you mean 'local_steps'?"),
        ("stages.paired.objectives.contrastt=1", "did you mean 'contrast'?"),
        ("data.sites.north.strem=image", "did you mean 'stream'?"),
        ("agregation={}", "did you mean 'aggregation'?"),
        ("zzzzzz=1", "unknown key 'zzzzzz'; `fedmix config schema` lists the known keys"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_known_key(override: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(override)
    assert suggestion in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "value", "allowed"),
    [
        ("model.width=-3", "model.width", "-3", "greater than or equal to 1"),
        ("model.vision_target=pixels", "model.vision_target", "'pixels'", "'multi_scale', 'single_scale' or 'norm_pix'"),
        ("data.sites.north.stream=video", "data.sites.0.stream", "'video'", "'image', 'text' or 'paired'"),
        ("stages.paired.optimiser.lr=fast", "stages.1.optimiser.lr", "'fast'", "a valid number"),
        ("stages.paired.optimiser.lr=.inf", "stages.1.optimiser.lr", "inf", "finite number"),
        ("stages.paired.optimiser.weight_decay=.nan", "stages.1.optimiser.weight_decay", "nan", "finite number"),
        ("stages.paired.objectives.hide_image_paired=1", "stages.1.objectives.hide_image_paired", "1", "less than 1"),
        ("name=My Run", "name", "'My Run'", "should match pattern"),
        ("seed=-1", "seed", "-1", "greater than or equal to 0"),
        ("stages=[]", "stages", "[]", "at least 1 item"),
    ],
)
def test_wrong_value_is_refused_with_key_value_and_what_is_allowed(override: str, key: str, value: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(override)
    message = str(caught.value)
    assert f"{key} = {value}: " in message
    assert allowed in message


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"stages\.0\.rounds is missing; it must be given"):
        parse("stages=[{name: alone}]")


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("model.width=0", "model.depht=2", "seed=x")
    assert all(part in str(caught.value) for part in ("model.width", "'depth'", "seed"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.width=30"], r"width = 30 must be a multiple of its number of heads \(4\) and of 4"),
        (["model.decoder_width=30"], r"decoder_width = 30 must be a multiple"),
        (["data.image_size=50"], r"data.image_size = 50 must be twice model.patch_size = 8"),
        (["data.image_size=8"], r"data.image_size = 8 must be twice model.patch_size = 8"),
        (["data.sites.north.name=south"], "site names must differ"),
        (["stages.paired.name=unpaired"], "stage names must differ"),
        (["data.sites.north.shard=/x"], "either phantom or shard, not both"),
        (["data.sites.south.test_studies=9"], "a shard has its own splits; take test_studies out"),
        (
            ["evaluation.at_sites=true", "privacy={mode: central_noise, epsilon: 8}", "aggregation.clip=null"],
            "exact sums over their patients, which no noise of privacy.mode = central_noise covers",
        ),
        (["model.warm_start={}"], "give warm_start an image file, a text folder, or both"),
        (["data.held_out.phantom=null"], "held_out either phantom or shards"),
        (["data.held_out.also.nih={}"], "data.held_out.also.nih: .*give held_out either phantom or shards"),
        (["stages.paired.objectives.match=1"], "set joint_share above 0"),
        (
            ["stages.paired.objectives={contrast: 0, match: 1, joint_share: .5, match_negatives: hard}"],
            "match_negatives = hard draws reports by contrast's similarity",
        ),
        (["stages.paired.objectives.queue=8"], "set same_patient = left_out beside it"),
        (
            ["model.contrast_form=sigmoid", "stages.paired.objectives={contrast: 1, queue: 8, same_patient: left_out}"],
            "stage 'paired': a queue adds to softmax's denominator",
        ),
        (
            ["model.contrast_form=margin", "stages.paired.objectives.label_smoothing=.1"],
            "model.contrast_form = margin makes none",
        ),
        (
            ["stages.paired.objectives.semantic=1", "federation.micro_batch=4"],
            "semantic and local compare a whole batch at once",
        ),
        (["stages.paired.objectives.local=1", "federation.processes_per_site=2"], "semantic and local compare a whole batch"),
        (
            ["model.contrast_form=sigmoid", "stages.paired.objectives.soft_targets=.2"],
            "stage 'paired': soft_targets and label_smoothing share one choice out",
        ),
        (
            ["stages.paired.objectives.label_smoothing=.1", "stages.paired.objectives.soft_targets=.2"],
            "label_smoothing gives every report a share",
        ),
        (["stages.paired.objectives={mvm: 0, mlm: 0}"], "every objective has weight 0"),
        (["stages.paired.sites=[wset]"], r"stage 'paired' names sites that data.sites does not hold: \['wset'\]"),
        (["stages.paired.sites=[north]"], r"stage 'paired' has no site: .* streams \['paired'\]"),
        (["data.sites.west.stream=text"], r"stage 'paired' has no site"),
        (["stages.unpaired.objectives.mlm=0"], r"stage 'unpaired': its text sites have nothing to learn; give objectives.mlm"),
        (["stages.unpaired.objectives.mvm=0"], r"stage 'unpaired': its image sites have nothing to learn"),
        (["aggregation.rule=paired_only"], r"stage 'unpaired' has no paired site, and aggregation.rule = paired_only"),
        (["aggregation.shared_mix={image: 0, text: 0}"], r"shared_mix is 0 for all of its streams \['image', 'text'\]"),
    ],
)
def test_contradiction_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*overrides)


def test_number_that_yaml_takes_for_text_is_still_a_number() -> None:
    """YAML 1.1 reads 1e-3, without a point, as text."""
    assert values_of(parse("stages.paired.optimiser.lr=1e-3"), "stages.1.optimiser.lr") == 1e-3


# ---- --set


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.width=128", "model.width", 128),
        ("model.modality_experts=false", "model.modality_experts", False),
        ("data.sites.west.phantom.studies=77", "data.sites.2.phantom.studies", 77),
        ("data.sites.2.phantom.studies=77", "data.sites.2.phantom.studies", 77),
        ("stages.paired.objectives.joint_share=.5", "stages.1.objectives.joint_share", 0.5),
        ("stages.0={name: first, rounds: 9}", "stages.0.rounds", 9),
        ("data.tokenizer=null", "data.tokenizer", None),
        ("federation.precision=bfloat16", "federation.precision", "bfloat16"),
        ("baselines.naive.aggregation.rule=fedavg_all", "baselines.naive.aggregation.rule", "fedavg_all"),
    ],
)
def test_set_reaches_keys_and_list_items_by_name_and_by_position(override: str, path: str, value: object) -> None:
    assert values_of(parse(override), path) == value


def test_set_of_a_later_option_wins() -> None:
    assert parse("seed=1", "seed=2").seed == 2


def test_set_changes_one_place_even_where_yaml_shares_it() -> None:
    shared = MINIMAL.replace("streams: [image, text]}", "streams: [image, text], optimiser: &o {lr: 0.5}}")
    shared = shared.replace("streams: [paired],", "streams: [paired], optimiser: *o,")
    changed = parse("stages.paired.optimiser.lr=0.25", text=shared)
    assert [stage.optimiser.lr for stage in changed.stages] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width", r"--set 'model.width': write it as key=value, such as --set model.width=128"),
        ("=3", "write it as key=value"),
        ("name.first=x", "'name' holds a value, it has no keys inside"),
        ("data.sites.nroth.stream=text", "'nroth' is neither a name nor a position in a list of 3"),
        ("data.sites.7.stream=text", "'7' is neither a name nor a position in a list of 3"),
        ("data.sites.-1.stream=text", "'-1' is neither a name nor a position"),
        ("stages.9={}", "'9' is neither a name nor a position in a list of 2"),
        ("model.width=[1", "model.width.* is not YAML at line 1"),
        ("model.width=!!int x", "model.width.* holds a value that YAML cannot read"),
    ],
)
def test_bad_set_is_refused_with_what_is_wrong(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(override)


# ---- files


def test_file_is_read_and_overridden(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(MINIMAL)
    assert config.load(tmp_path / "demo.yaml", ["seed=5"]).seed == 5


def test_missing_file_is_an_error_that_points_to_examples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config at .*nothing.yaml; configs/ holds examples"):
        config.load(tmp_path / "nothing.yaml")


def test_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        config.load(tmp_path)


def test_oversized_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    path.write_text("[" * (config.MAX_CONFIG_BYTES + 1))  # parsed, it would be another error
    with pytest.raises(ConfigError, match=f"holds {config.MAX_CONFIG_BYTES + 1} bytes; a config has at most"):
        config.load(path)


# Nine times nine times nine ...: a hundred bytes that unfold to half a million values.
LAUGHS = "a: &a [1,2,3,4,5,6,7,8,9]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcde", "bcdef", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1, 2", "is not YAML at line 1"),
        ("name: demo\n\tseed: 1", "is not YAML at line 2"),
        ("", "must hold keys and values at its top"),
        ("- name: demo", "must hold keys and values at its top"),
        ("seed: 2001-99-99", "holds a value that YAML cannot read"),
        ("seed: !!int many", "holds a value that YAML cannot read"),
        ("seed: !!bool perhaps", "holds a value that YAML cannot read"),
        ("seed: !!timestamp now", "holds a value that YAML cannot read"),
        ("seed: 1" + "0" * 5000, "holds a value that YAML cannot read"),
        ("seed: " + "[" * 500, "is nested too deeply"),
        ("seed: " + "[" * 60 + "]" * 60, "50 levels"),
        ("seed: &a [*a]", "aliases unfolded"),
        (LAUGHS, "aliases unfolded"),
    ],
)
def test_text_that_is_no_experiment_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse(text)


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system [touch BAIT]", "!!python/name:os.system", "!!python/tuple [1]", "!include x", "!x y"],
)
def test_yaml_tags_are_refused_and_nothing_runs(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for attempt in (lambda: config.parse(f"name: {tag}"), lambda: parse(f"name={tag}")):
        with pytest.raises(ConfigError, match="is not YAML at line 1: could not determine a constructor for the tag"):
            attempt()
    assert not list(tmp_path.iterdir())


# ---- baselines


def test_variant_merges_keys_and_replaces_lists() -> None:
    experiment = parse("baselines.short={model: {width: 32}, stages: [{name: only, rounds: 1}]}")
    variant = config.variant(experiment, "short")
    assert (variant.name, variant.model.width, variant.model.depth) == ("short", 32, experiment.model.depth)
    assert [stage.name for stage in variant.stages] == ["only"]
    assert variant.data == experiment.data
    assert variant.baselines == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "baselines.naive.agregation.rule=fedavg_all",
            r"baselines.naive: unknown key 'agregation'; did you mean 'aggregation'",
        ),
        ("baselines.naive.aggregation.rule=fedavg", r"baselines.naive: aggregation.rule = 'fedavg': input should be"),
        ("baselines.pairs.aggregation.rule=paired_only", "baselines.pairs: stage 'unpaired' has no paired site"),
        ("baselines.pairs.name=!!binary /w==", "baselines.pairs.name"),
    ],
)
def test_mistake_in_a_baseline_is_found_when_the_config_is_read(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(override)


def test_more_processes_than_a_batch_has_studies_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"stage 'unpaired': a batch of 24 leaves some of .*processes_per_site = 25 with nothing"
    ):
        parse("federation.processes_per_site=25")
    assert parse("federation.processes_per_site=24").federation.processes_per_site == 24


# ---- fingerprint and round trip


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if not items:
        yield path, node
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


# One other valid value for everything that decides the weights.
DECIDES = {
    "seed": 1,
    "data.image_size": 56,
    "data.max_words": 32,
    "data.tokenizer": "/models/tokenizer",
    "data.sites.0.name": "nord",
    "data.sites.0.stream": "text",
    "data.sites.0.phantom.studies": 11,
    "data.sites.0.phantom.look": "east",
    "data.sites.0.phantom.seed": 3,
    "data.sites.0.phantom.difficulty": 2.0,
    "data.sites.0.phantom.contrast": 2.0,
    "model.size": "tiny",
    "model.patch_size": 16,
    "model.vision_target": "norm_pix",
    "model.width": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.mlp_ratio": 2.0,
    "model.modality_experts": "false",
    "model.pair_experts": 1,
    "model.decoder_width": 32,
    "model.decoder_depth": 2,
    "model.decoder_heads": 2,
    "model.embedding": 32,
    "model.contrast_form": "sigmoid",
    "stages.1.name": "pairs",
    "stages.1.rounds": 4,
    "stages.0.streams": "[image]",
    "stages.1.sites": "[west]",
    "stages.1.local_steps": 5,
    "stages.1.batch_size": 5,
    "stages.1.objectives.mvm": 0.5,
    "stages.1.objectives.mlm": 0.5,
    "stages.1.objectives.contrast": 0.5,
    "stages.1.objectives.anchor": 0.5,
    "stages.1.objectives.semantic": 0.5,
    "stages.1.objectives.local": 0.5,
    "stages.1.objectives.joint_share": 0.5,
    "stages.1.objectives.hide_image_alone": 0.5,
    "stages.1.objectives.hide_image_paired": 0.5,
    "stages.1.objectives.hide_image_joint": 0.5,
    "stages.1.objectives.hide_text_alone": 0.5,
    "stages.1.objectives.hide_text_paired": 0.5,
    "stages.1.objectives.hide_text_joint": 0.4,
    "stages.1.objectives.joint_masking": "one_at_a_time",
    "stages.1.objectives.match_negatives": "hard",
    "stages.1.objectives.label_smoothing": 0.1,
    "stages.1.objectives.soft_targets": 0.2,
    "stages.1.objectives.soft_temperature": 0.2,
    "stages.1.objectives.same_patient": "left_out",
    "stages.1.augment.smallest_crop": 0.5,
    "stages.1.augment.rotation_deg": 5.0,
    "stages.1.augment.gamma": 0.2,
    "stages.1.augment.gain": 0.1,
    "stages.1.augment.offset": 0.1,
    "stages.1.augment.mirror": 0.5,
    "stages.1.optimiser.kind": "adamw",
    "stages.1.optimiser.lr": 0.5,
    "stages.1.optimiser.muon_lr": 0.5,
    "stages.1.optimiser.weight_decay": 0.5,
    "stages.1.optimiser.clip_norm": 0.5,
    "stages.1.optimiser.warmup": 0.5,
    "stages.1.optimiser.final_lr": 0.5,
    "stages.1.optimiser.keep_state": "false",
    "stages.1.optimiser.second_moment": "aggregated",
    "stages.1.optimiser.proximal": 0.01,
    "stages.1.outer.kind": "adam",
    "stages.1.outer.beta2": 0.9,
    "stages.1.outer.epsilon": 1e-8,
    "stages.1.outer.lr": 0.5,
    "stages.1.outer.momentum": 0.5,
    "stages.1.outer.nesterov": "false",
    "aggregation.rule": "fedavg_all",
    "aggregation.shared_mix.image": 0.5,
    "aggregation.shared_mix.text": 0.5,
    "aggregation.shared_mix.paired": 0.5,
    "aggregation.count_exponent": 0.5,
    "aggregation.combine": "median",
    "aggregation.trim": 0.3,
    "aggregation.clip": 2.0,
    "aggregation.normalise_steps": False,
    "wire.coding": "int8",
    "wire.keep": 0.5,
    "wire.error_feedback": False,
    "screening.norm_bound": 5.0,
    "screening.window": 10,
    "screening.max_strikes": 2,
    "federation.participation": 0.5,
    "federation.threads_per_site": 2,
    "federation.processes_per_site": 2,
    "federation.micro_batch": 4,
    "federation.precision": "bfloat16",
}
# One other valid value for everything that does not.
DECIDES_NOT = {
    "name": "other",
    "data.sites.south.shard": "/elsewhere/south",
    "data.sites.0.test_studies": 30,
    "model.warm_start": "{image: /models/vit.safetensors}",
    "data.cache": "/tmp/phantoms",
    "data.held_out": "{shards: [/data/test], public: true, probe_studies: 5, also: {nih: {shards: [/data/nih]}}}",
    "federation.workers": 2,
    "federation.checkpoint_activations": "true",
    "federation.device": "cuda",
    "federation.deadline_s": 5.0,
    "federation.slowest_link_mbit_s": 8.0,
    "federation.min_sites": 2,
    "federation.min_sites_of_stream": "{paired: 1}",
    "study": "{seeds: [1, 2]}",
    "federation.max_failed_rounds": 1,
    "evaluation": "{every: 3, gallery: 10, mask_ratio: .5, num_bootstrap: 20, regeneration_images: 5, rerank_top: 20, "
    "fine_tune_steps: 9, prompt_tune_steps: 9, at_sites: true}",
    "baselines": "{random_init: {}}",
}


@pytest.mark.parametrize("key", DECIDES)
def test_fingerprint_changes_with_what_decides_the_weights(key: str) -> None:
    changed = parse(f"{key}={DECIDES[key]}")
    assert changed.fingerprint() != parse().fingerprint()


@pytest.mark.parametrize("key", DECIDES_NOT)
def test_fingerprint_ignores_names_paths_workers_and_evaluation(key: str) -> None:
    changed = parse(f"{key}={DECIDES_NOT[key]}")
    assert changed != parse()
    assert changed.fingerprint() == parse().fingerprint()


def test_every_key_is_known_to_decide_the_weights_or_not_to() -> None:
    """A new key must be given a line in one of the two tables above."""
    listed = {key.replace("stages.0", "stages.1") for key in DECIDES} | set(DECIDES_NOT)
    # The same by position; needs joint_share beside it; needs same_patient beside it.
    listed |= {"data.sites.1.shard", "stages.1.objectives.match", "stages.1.objectives.queue"}
    listed |= {"privacy", "attack", "secure_sum"}  # they exclude what this experiment does; tests of their own
    unlisted = {
        path
        for path, _ in leaves(parse().model_dump(mode="json"))
        if not path.startswith(("data.sites.1.", "data.sites.2.", "stages.0.", "data.sites.0.shard", "stages.1.streams"))
        and not any(path == key or path.startswith(f"{key}.") for key in listed)
    }
    assert unlisted == set()


@pytest.mark.parametrize("override", ["seed=0", "stages.1.optimiser.lr=1e-5", "baselines.naive.aggregation.rule=fedavg_all"])
def test_resolved_yaml_reads_back_as_the_same_experiment(override: str) -> None:
    experiment = parse(override)
    again = config.parse(experiment.to_yaml())
    assert again == experiment
    assert again.fingerprint() == experiment.fingerprint()


def test_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    values = yaml.safe_load(parse().to_yaml())
    turned = {key: dict(reversed(part.items())) if isinstance(part, dict) else part for key, part in reversed(values.items())}
    assert config.build(turned).fingerprint() == parse().fingerprint()


@pytest.mark.parametrize("path", sorted(Path(config.__file__).parents[2].glob("configs/**/*.yaml")), ids=lambda path: path.name)
def test_shipped_experiments_are_read(path: Path) -> None:
    if "stages" not in yaml.safe_load(path.read_text()):
        pytest.skip("not an experiment: an example of another file")
    assert config.load(path).num_rounds > 0


# ---- sizes by name


def test_keys_given_beside_a_size_override_it() -> None:
    model = parse("model={size: small, depth: 6, embedding: 64}").model
    assert (model.size, model.width, model.depth, model.embedding, model.decoder_width) == ("small", 384, 6, 64, 256)


def test_size_means_the_values_it_stands_for() -> None:
    """The same fingerprint as with every value written out, and the resolved YAML reads back the same."""
    named = parse("model.size=tiny")
    values = {key: getattr(named.model, key) for key in SIZES["tiny"]}
    assert parse(f"model={values}").fingerprint() == named.fingerprint()
    assert config.parse(named.to_yaml()) == named


def test_no_size_keeps_the_defaults() -> None:
    assert parse("model.size=null") == parse()
    assert (parse().model.width, parse().model.depth, parse().model.patch_size) == (96, 4, 8)


@pytest.mark.parametrize("overrides", [["model.depth=6", "model.size=tiny"], ["model.size=tiny", "model.depth=6"]])
def test_size_on_the_command_line_replaces_the_files_sizes_and_not_its_neighbours(overrides: list[str]) -> None:
    model = parse(*overrides, text=f"{MINIMAL}model: {{width: 64, mlp_ratio: 2.0}}\n").model
    assert (model.width, model.depth, model.mlp_ratio) == (192, 6, 2.0)


def test_size_in_a_baseline_or_a_regime_replaces_the_experiments() -> None:
    experiment = parse("model.size=small", "baselines={little: {model: {size: tiny}}, thin: {model: {size: tiny, width: 96}}}")
    assert config.variant(experiment, "little").model == parse("model.size=tiny").model
    assert config.variant(experiment, "thin").model.width == 96
    assert config.parse(experiment.to_yaml(), ["model.size=tiny"]).model == parse("model.size=tiny").model


def test_size_that_is_not_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.size = 'huge': input should be 'tiny', 'small' or 'base'"):
        parse("model.size=huge")


# ---- rounds and stages


def test_rounds_are_counted_through_the_stages() -> None:
    experiment = parse()
    found = [experiment.stage_of(number) for number in range(1, experiment.num_rounds + 1)]
    assert [(stage.name, before) for stage, before in found] == [
        ("unpaired", 0), ("unpaired", 1), ("paired", 0), ("paired", 1), ("paired", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("number", [-1, 0, 6])
def test_round_outside_the_stages_is_refused(number: int) -> None:
    with pytest.raises(ConfigError, match=f"round {number} "):
        parse().stage_of(number)


def test_sites_of_a_stage_are_those_of_its_streams_and_names() -> None:
    experiment = parse("stages.0.sites=[north]")
    assert [[site.name for site in config.sites_of(stage, experiment.data.sites)] for stage in experiment.stages] == [
        ["north"],
        ["west"],
    ]


# ---- what a run trains


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ((), ("mvm", "mlm", "contrast")),
        (("stages.paired.objectives={contrast: 1, match: 0.1, joint_share: 0.5}",), ("mvm", "mlm", "contrast", "match")),
        (("stages.paired.objectives={match: 0.1, joint_share: 0.5}", "stages.paired.streams=[image]"), ("mvm", "mlm")),
        (("stages.unpaired.streams=[image]", "stages.paired.streams=[image]"), ("mvm",)),
        (("stages.paired.objectives={mvm: 0, mlm: 0, semantic: 1, local: 1}",), ("mvm", "mlm", "semantic", "local")),
    ],
)
def test_objectives_count_as_trained_where_a_site_of_their_stream_takes_part(
    overrides: tuple[str, ...], names: tuple[str, ...]
) -> None:
    """An objective of pairs in a stage without a paired site trains nothing, whatever its weight."""
    assert parse(*overrides).trained_on == names


# ---- schema


def test_schema_is_valid_json_schema_and_accepts_what_the_program_accepts() -> None:
    schema = config.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(MINIMAL), schema)
    jsonschema.validate(parse().model_dump(mode="json"), schema)


def test_schema_refuses_an_unknown_key() -> None:
    with pytest.raises(jsonschema.ValidationError, match="widht"):
        jsonschema.validate(yaml.safe_load(MINIMAL) | {"model": {"widht": 3}}, config.json_schema())


def test_schema_describes_every_section_and_every_key_that_has_a_unit() -> None:
    schema = config.json_schema()
    assert all(section.get("description") for section in schema["$defs"].values() if section.get("type") == "object")
    described = {
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, field in section.get("properties", {}).items()
        if field.get("description")
    }
    assert {"Data.image_size", "Data.max_words", "Stage.local_steps", "Federation.deadline_s", "Objectives.mvm"} <= described


# ---- junk

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def accepts_or_explains(text: str, *overrides: str) -> None:
    try:
        experiment = config.parse(text, overrides)
    except ConfigError:
        return
    assert config.parse(experiment.to_yaml()).fingerprint() == experiment.fingerprint()


@settings(max_examples=80, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_random_text_raises_nothing_but_a_config_error(text: str) -> None:
    accepts_or_explains(text)
    accepts_or_explains(MINIMAL, text)


@settings(max_examples=80, deadline=None)
@given(path=st.sampled_from([path for path, _ in leaves(parse().model_dump(mode="json"))]), value=JUNK)
def test_random_value_of_a_known_key_raises_nothing_but_a_config_error(path: str, value: object) -> None:
    values = parse().model_dump(mode="json")
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    node: Any = values
    for part in parents:
        node = node[part]
    node[last] = value
    accepts_or_explains(yaml.safe_dump(values, allow_unicode=True))


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(sorted(DECIDES | DECIDES_NOT)), text=st.text(max_size=20))
def test_random_set_raises_nothing_but_a_config_error(key: str, text: str) -> None:
    accepts_or_explains(MINIMAL, f"{key}={text}")


@settings(max_examples=100, deadline=None)
@given(overrides=JUNK)
def test_random_baseline_raises_nothing_but_a_config_error(overrides: object) -> None:
    values = yaml.safe_load(MINIMAL) | {"baselines": {"junk": overrides}}
    accepts_or_explains(yaml.safe_dump(values, allow_unicode=True))


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=60))
def test_random_bytes_raise_nothing_but_a_config_error(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError):
        config.load(path)


def test_schema_is_plain_json() -> None:
    assert json.loads(json.dumps(config.json_schema())) == config.json_schema()


def private(**privacy: object) -> dict[str, Any]:
    """A smallest experiment under differential privacy."""
    values = {"studies": 8, "look": "north"}
    return {
        "name": "guarded",
        "data": {
            "sites": [{"name": "west", "stream": "paired", "phantom": values}],
            "held_out": {"phantom": values | {"look": "unseen"}},
        },
        "stages": [{"name": "all", "rounds": 1}],
        "privacy": {"mode": "dp", "noise_multiplier": 1.0} | privacy,
    }


@pytest.mark.parametrize(
    "other",
    [
        {"epsilon": 3.0},
        {"delta": 1e-6},
        {"noise_multiplier": 2.0},
        {"clip": 2.0},
        {"studies_per_patient": 1},
        {"trainable": "heads"},
        {"trainable": "adapters", "adapter_rank": 8},
    ],
)
def test_fingerprint_covers_privacy_and_is_the_old_one_without(other: dict[str, object]) -> None:
    guarded = config.build(private())
    assert config.build(private(**other)).fingerprint() != guarded.fingerprint()
    plain = config.build(private() | {"privacy": {"mode": "none"}})
    assert (
        plain.fingerprint() == config.build({key: value for key, value in private().items() if key != "privacy"}).fingerprint()
    )
    assert plain.fingerprint() != guarded.fingerprint()
    narrow = config.build(private() | {"privacy": {"mode": "none", "trainable": "adapters"}})
    assert narrow.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"privacy": {"mode": "dp"}}, "needs a budget epsilon, a noise_multiplier, or both"),
        ({"privacy": {"epsilon": 3.0}}, "nothing would be protected"),
        ({"stages": [{"name": "all", "rounds": 1, "objectives": {"contrast": 1.0}}]}, "compare studies of different patients"),
        (
            {"stages": [{"name": "all", "rounds": 1, "objectives": {"match": 0.1, "joint_share": 0.5}}]},
            "compare studies of different patients",
        ),
        (
            {"stages": [{"name": "all", "rounds": 1, "objectives": {"joint_share": 0.5, "joint_masking": "one_at_a_time"}}]},
            "set it to both",
        ),
        ({"stages": [{"name": "all", "rounds": 1, "objectives": {"semantic": 1.0}}]}, "compare studies of different patients"),
        ({"federation": {"processes_per_site": 2}}, "processes_per_site to 1"),
        ({"privacy": {"mode": "none", "trainable": "heads"}, "federation": {"processes_per_site": 2}}, "train the whole model"),
        (
            {
                "privacy": {"mode": "none", "trainable": "adapters"},
                "stages": [{"name": "all", "rounds": 1, "optimiser": {"second_moment": "aggregated"}}],
            },
            "second_moment to own",
        ),
        ({"federation": {"checkpoint_activations": True}}, "checkpoint_activations to false"),
    ],
)
def test_privacy_with_what_it_cannot_cover_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config.build(private() | changes)
