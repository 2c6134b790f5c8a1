"""`fedmix audit`: attack a trained model as an adversary would, and say what it gives away. `fedmix canaries`: plant what can
be found again.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedmix.commands.consoles import error_console, out_console
from fedmix.errors import ConfigError

if TYPE_CHECKING:
    from fedmix.data.shard import Shard
    from fedmix.data.tokenizer import Tokenizer
    from fedmix.evaluation.subjects import Subjects
    from fedmix.model.encoder import MixedModel
    from fedmix.model.folder import Sizes

    Loaded = tuple[MixedModel, Sizes, Tokenizer]

Audited = Annotated[Path, typer.Argument(metavar="MODEL", help="model folder, such as runs/demo/model")]
Members = Annotated[
    list[Path], typer.Option(metavar="SHARD", help="trained on: its training split is attacked; give it again for more")
]
Others = Annotated[
    list[Path],
    typer.Option(metavar="SHARD", help="never trained on: validation and test split of a members' shard, or all of another"),
]
Reference = Annotated[
    Path | None,
    typer.Option(metavar="MODEL", help="a model that saw none of them; makes the attack stronger and checks it"),
]
Update = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        metavar="BEFORE AFTER", help="models before and after the members' site took its steps: what its update gives away"
    ),
]
Planted = Annotated[
    Path | None, typer.Option(metavar="FILE", help="canaries.json of `fedmix canaries`, if its shard was trained on too")
]
MostPatients = Annotated[int, typer.Option(min=1, help="of either side, drawn at random")]
Draws = Annotated[int, typer.Option(min=1, help="masks of each study; more find more")]
Delta = Annotated[float, typer.Option(min=0.0, max=0.5, help="at which the bound of epsilon is stated")]


def audit(
    model: Audited,
    members: Members,
    non_members: Others,
    reference: Reference = None,
    update: Update = None,
    canaries: Planted = None,
    out: Annotated[Path, typer.Option(help="where leakage.json and leakage.html go")] = Path("audit"),
    most_patients: MostPatients = 2000,
    draws: Draws = 4,
    delta: Delta = 1e-5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Try to find out from a model whose studies it was trained on, and write what that means for a data-protection officer.

    Membership of studies and patients, re-linkage of images with reports, and a lower bound of epsilon; canaries, and what one
    site's update gives away, if they are named. Counts and rates only are written. Fairest is one shard on both sides, of
    which the model was trained on the training split.

    Example:  fedmix audit runs/demo/model --members shards/nih --non-members shards/nih --out audits/nih
    """
    from fedmix.data.planted import Plan
    from fedmix.data.shard import Shard
    from fedmix.evaluation import leakage, subjects
    from fedmix.evaluation.canaries import planted_report
    from fedmix.evaluation.membership import AuditSettings
    from fedmix.model.folder import load_model

    out.mkdir(parents=True, exist_ok=True)  # before minutes of work, if it cannot be
    attacked, _, tokenizer = loaded = load_model(model)
    compared = None if reference is None else _of_its_kind(reference, loaded, "the reference")
    ends = None
    if update is not None:
        ends = _of_its_kind(update[0], loaded, "BEFORE"), _of_its_kind(update[1], loaded, "AFTER")
    plan = None if canaries is None else Plan.read(canaries)
    trained, outside = ([Shard.open(path) for path in side] for side in (members, non_members))
    people = _people(trained, outside, loaded, most_patients=most_patients, seed=seed)
    settings = AuditSettings(num_draws=draws, delta=delta, seed=seed)
    with error_console.status("attacking"):
        found = leakage.audit(attacked, people, tokenizer, reference=compared, settings=settings)
        if plan is not None:
            found["canaries"] = planted_report(attacked, plan, tokenizer, settings=settings)
        if ends is not None:
            seen = subjects.words_trained_on(trained)
            found["update"] = leakage.update_report(ends, people, tokenizer, seen, settings=settings)
    _write(out, found, model)


def canaries(
    out: Annotated[Path, typer.Option(help="folder for shard/, to be trained on, and canaries.json, for `fedmix audit`")],
    words: Annotated[int, typer.Option(min=0, max=500, help="of each text; 0 plants pictures alone")] = 12,
    size: Annotated[int, typer.Option(min=0, max=1024, help="pixels a side of each picture; 0 plants texts alone")] = 224,
    each: Annotated[int, typer.Option(min=1, max=1000, help="canaries that 1, 2, 4 and 8 patients hold")] = 4,
    max_words: Annotated[int, typer.Option(min=4, max=512, help="as the site's shards were prepared")] = 128,
    tokenizer: Annotated[Path | None, typer.Option(help="as the site's shards were prepared; else the shipped one")] = None,
    key_file: Annotated[Path, typer.Option(help="the site's secret key; made if absent")] = Path("site.key"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a shard of patients that never were, whose texts and pictures are random: train on it beside a site's own shards.

    Afterwards `fedmix audit --canaries` says how much better the model knows them than others that were drawn alike. With
    words and pictures its studies are pairs, else reports or images alone. Each costs the model a little: plant few.

    Example:  fedmix canaries --out canaries --size 96

    Then, after training on canaries/shard too:  fedmix audit runs/demo/model --canaries canaries/canaries.json ...
    """
    from fedmix.data.keys import site_key
    from fedmix.data.planted import Plan
    from fedmix.data.tokenizer import Tokenizer

    if not words and not size:
        raise ConfigError("canaries without words and without pictures are nothing; give --words or --size")
    read = Tokenizer.load(tokenizer)
    plan = Plan(seed=seed, tokenizer=read.fingerprint, num_words=words, image_size=size, each=each)
    out.mkdir(parents=True, exist_ok=True)
    plan.plant(out / "shard", tokenizer=read, key=site_key(key_file), max_words=max_words)
    plan.write(out / "canaries.json")
    num = f"{len(plan.times_of)} canaries of {plan.times_of.sum()} patients"
    out_console.print(Text(f"wrote {out / 'shard'}: {num}, and {out / 'canaries.json'}"), soft_wrap=True)


def _people(trained: list[Shard], outside: list[Shard], attacked: Loaded, *, most_patients: int, seed: int) -> Subjects:
    """Whom the audit asks about; shards that the model cannot read are refused."""
    from fedmix.evaluation import subjects

    _, sizes, tokenizer = attacked
    return subjects.of_shards(
        trained,
        outside,
        image_size=sizes.image_size,
        tokenizer=tokenizer.fingerprint,
        most_patients=most_patients,
        seed=seed,
    )


def _of_its_kind(folder: Path, attacked: Loaded, what: str) -> MixedModel:
    """Another model, which has to read what the attacked one reads."""
    from fedmix.model.folder import load_model

    model, sizes, tokenizer = load_model(folder)
    _, own_sizes, own_tokenizer = attacked
    if (sizes.image_size, tokenizer.fingerprint) != (own_sizes.image_size, own_tokenizer.fingerprint):
        raise ConfigError(f"{what} reads other image sizes or another vocabulary; name one of the same as the model's")
    return model


def _write(out: Path, found: dict[str, Any], model: Path) -> None:
    """leakage.json, leakage.html, and a table on the terminal."""
    from fedmix.report.files import write_json
    from fedmix.report.leakage import audited, rows, write_leakage

    found["audited"] = audited(model, datetime.now(UTC))
    write_json(out / "leakage.json", found)
    table = Table("attack", "AUC or points", "95 %", "what it means", box=None)
    for row in rows(found):
        table.add_row(*map(Text, row))
    out_console.print(table)
    out_console.print(Text(f"wrote {write_leakage(out / 'leakage.html', found)}"), soft_wrap=True)
