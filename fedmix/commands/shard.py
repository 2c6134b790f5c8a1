"""`fedmix shard`: look at prepared shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedmix.commands.consoles import out_console

if TYPE_CHECKING:
    from fedmix.data.inspection import Declaration

shard_app = typer.Typer(
    no_args_is_help=True, help="Look at prepared shards.\n\nExample:  fedmix shard check shards/pairs shards/reports"
)


@shard_app.command("check")
def check(shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="all shards of one site")]) -> None:
    """Verify shards and that they fit together, and print what the site would declare to a federation: counts only.

    Every file is read once and compared with the hash it was written with. Shards of one site have to share the key, the
    tokenizer and the image size, and no patient may stand in two splits.

    Example:  fedmix shard check shards/pairs shards/reports
    """
    from fedmix.data import inspection
    from fedmix.data.shard import Shard

    opened = [Shard.open(path) for path in shards]
    for path, shard in zip(shards, opened, strict=True):
        out_console.print(_declared(path, inspection.declaration(shard)))
    inspection.check_together(opened)
    out_console.print("whole, and no patient stands in two splits")
    if len(opened) > 1:
        out_console.print(f"{inspection.num_shared(opened)} patients stand in more than one of these shards")
    if any(not shard.manifest.key_mark for shard in opened):
        out_console.print("an older shard does not say which site key it was made with: patients were compared all the same")


@shard_app.command("preview")
def preview(
    shard: Annotated[Path, typer.Argument(metavar="SHARD")],
    out: Annotated[Path, typer.Option(help="folder for the page and its contact sheet; holds patients' images")],
) -> None:
    """Draw some 48 images of a shard with their views, and a page of its counts, for a radiologist at the site to look at.

    Is anything sideways, inverted or cut off? What was left out, and how is it mended? No text of a report and no identifier
    is in it, but patients' images are: it may not lie in the shard, and should be deleted once it has been looked at.

    Example:  fedmix shard preview shards/pairs --out preview
    """
    from fedmix.data.shard import Shard
    from fedmix.report.preview import write_preview

    out_console.print(f"look at {write_preview(Shard.open(shard), out)}", soft_wrap=True, markup=False)


def _declared(path: Path, said: Declaration) -> Table:
    table = Table(title=Text(f"{path}: {sum(said.streams.values())} studies of {said.num_patients} patients"), box=None)
    table.add_column("what")
    table.add_column("count", justify="right")
    groups = (("", said.streams, " studies"), ("split ", said.splits, ""), ("view ", said.views, ""))
    for before, counts, after in (*groups, ("texts, language ", said.languages, ""), ("with ", said.positives, "")):
        for name, count in counts.items():
            table.add_row(Text(f"{before}{name}{after}"), str(count))
    table.add_row("pixels a side", str(said.image_size))
    table.add_row("tokenizer", said.tokenizer[:12])
    table.add_row(Text(f"texts: {said.texts}", style="dim"), "")
    return table
