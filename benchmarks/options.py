"""What the options of several benchmarks hold: numbers, separated by commas."""

import typer


def numbers(option: str, text: str, least: int) -> list[int]:
    """Return the whole numbers in `text`; `typer.BadParameter` where there are none, or one below `least`."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise typer.BadParameter(f"{option} wants whole numbers of at least {least}, separated by commas; got {text!r}")
    return found


def sizes(option: str, text: str) -> list[float]:
    """Return the sizes in `text`, in MiB; `typer.BadParameter` for one that is out of bounds."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0.001 <= size <= 4096 for size in found):
        raise typer.BadParameter(f"{option} wants sizes from 0.001 to 4096, separated by commas; got {text!r}")
    return [int(size) if size.is_integer() else size for size in found]


def lengths_of(text: str) -> tuple[int, int] | None:
    """Return the longest prompt and completion that `text` names, None if it is empty."""
    if not text:
        return None
    found = numbers("--lengths", text, 1)
    if len(found) != 2:
        raise typer.BadParameter(
            f"--lengths wants two numbers, of a prompt and a completion, such as 256,128; got {text!r}"
        )
    return found[0], found[1]
