"""`fedmix audit`: attack a trained model as an adversary would, and say what it gives away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedmix.commands.consoles import error_console, out_console


def audit(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="model folder, such as runs/demo/model")],
    members: Annotated[
        list[Path], typer.Option(metavar="SHARD", help="trained on: its training split is attacked; give it again for more")
    ],
    non_members: Annotated[
        list[Path],
        typer.Option(
            metavar="SHARD", help="never trained on: validation and test split of a members' shard, or all of another"
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="a model that saw none of them; makes the attack stronger and checks it"),
    ] = None,
    out: Annotated[Path, typer.Option(help="where leakage.json and leakage.html go")] = Path("audit"),
    most_patients: Annotated[int, typer.Option(min=1, help="of either side, drawn at random")] = 2000,
    draws: Annotated[int, typer.Option(min=1, help="masks of each study; more find more")] = 4,
    delta: Annotated[float, typer.Option(min=0.0, max=0.5, help="at which the bound of epsilon is stated")] = 1e-5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Try to find out from a model whose studies it was trained on, and write what that means for a data-protection officer.

    Membership of studies and patients, re-linkage of images with reports, and a lower bound of epsilon. Counts and rates only
    are written. Fairest is one shard on both sides, of which the model was trained on the training split.

    Example:  fedmix audit runs/demo/model --members shards/nih --non-members shards/nih --out audits/nih
    """
    from fedmix.data.shard import Shard
    from fedmix.errors import ConfigError
    from fedmix.evaluation import leakage, subjects
    from fedmix.evaluation.membership import AuditSettings
    from fedmix.model.folder import load_model
    from fedmix.report.leakage import rows, write_leakage
    from fedmix.report.summary import write_json

    out.mkdir(parents=True, exist_ok=True)  # before minutes of work, if it cannot be
    attacked, sizes, tokenizer = load_model(model)
    compared = None
    if reference is not None:
        compared, other_sizes, other_tokenizer = load_model(reference)
        if (other_sizes.image_size, other_tokenizer.fingerprint) != (sizes.image_size, tokenizer.fingerprint):
            raise ConfigError(
                "the reference reads other image sizes or another vocabulary; name one of the same as the model's"
            )
    people = subjects.of_shards(
        [Shard.open(path) for path in members],
        [Shard.open(path) for path in non_members],
        image_size=sizes.image_size,
        tokenizer=tokenizer.fingerprint,
        most_patients=most_patients,
        seed=seed,
    )
    with error_console.status("attacking"):
        found = leakage.audit(
            attacked,
            people,
            tokenizer,
            reference=compared,
            settings=AuditSettings(num_draws=draws, delta=delta, seed=seed),
        )
    write_json(out / "leakage.json", found)
    table = Table("attack", "AUC or points", "95 %", "what it means", box=None)
    for row in rows(found):
        table.add_row(*map(Text, row))
    out_console.print(table)
    out_console.print(Text(f"wrote {write_leakage(out / 'leakage.html', found)}"), soft_wrap=True)
