"""`--data.map`: columns of other names, such as question and answer, become messages or the keys of
a format.
"""

from collections.abc import Sequence

from torchsft.data.keys import WEIGHTS
from torchsft.data.rows import Row, RowError

ROLES = ("system", "user", "assistant")
# Columns that are known from files of the field: what is asked, and what is answered.
QUESTIONS = "question query instruction input prompt problem user human source request".split()
ANSWERS = "answer response output completion solution assistant gpt target reply text".split()
SYSTEMS = ("system", "system_prompt")
NUMBERS = (*WEIGHTS, "train", "trainable")


def number_of(cell: str) -> float | bool | str | None:
    """Return the weight or switch in a cell of a table, whose cells are all text.

    Returns:
        None for an empty cell; what is neither weight nor switch stays as it is, to be refused.
    """
    text = cell.strip().lower()
    if text in ("", "true", "false"):
        return text == "true" if text else None
    try:
        return float(text)
    except ValueError:
        return cell


def mapped(row: Row, pairs: Sequence[tuple[str, str]]) -> Row:
    """Return the row with its columns under the names that `pairs` (of `config.Data.columns`) gives
    them.

    Several columns of one role are joined, with an empty line between them.

    Raises:
        RowError: bad-map: a column is missing, no text, or would replace another one.
    """
    columns = {column for column, _ in pairs}
    result = {key: value for key, value in row.items() if key not in columns}
    turns = {}  # texts, by their role
    makes_turns = any(target in ("user", "assistant") for _, target in pairs)
    for column, target in pairs:
        if target == "ignore":
            continue
        if column not in row:
            has = ", ".join(sorted(row)) or "none"
            raise RowError(
                "bad-map", f"--data.map names the column {column!r}, but the row has {has}"
            )
        value = row[column]
        if makes_turns and target in ROLES:
            if not isinstance(value, str) and (value is not None or target != "system"):
                raise RowError(
                    "bad-map",
                    f"the column {column!r}, which --data.map makes a turn, holds no text but "
                    f"{value!r:.60}",
                )
            turns.setdefault(target, []).append(value or "")
        elif result.get(target) is not None:
            raise RowError(
                "bad-map",
                f"--data.map makes {column!r} the key {target!r}, but the row has that as well; "
                f"map that to ignore",
            )
        elif target in NUMBERS and isinstance(value, str):
            result[target] = number_of(value)
        else:
            result[target] = value
    if makes_turns:
        if result.get("messages") is not None:
            raise RowError(
                "bad-map",
                "--data.map makes messages, but the row has messages; leave it out",
            )
        result["messages"] = []
        for role in (role for role in ROLES if role in turns):
            text = "\n\n".join(filter(str.strip, turns[role]))
            if text or role != "system":
                result["messages"].append({"role": role, "content": text})
    return result


def suggestion(row: Row) -> str:
    """Return the option that would make messages of a row, as the end of a sentence; "" where none
    is evident.
    """
    names = {str(key).lower(): str(key) for key, value in row.items() if isinstance(value, str)}
    asked = next((names[name] for name in QUESTIONS if name in names), None)
    answered = next((names[name] for name in ANSWERS if name in names), None)
    if asked is None or answered is None or asked == answered:
        texts = [key for key in row if isinstance(row[key], str)]
        if len(texts) < 2:
            return ""
        return f"; or name its columns, for example --data.map {texts[0]}=user,{texts[1]}=assistant"
    system = next((f"{names[name]}=system," for name in SYSTEMS if name in names), "")
    return f"; or add --data.map {system}{asked}=user,{answered}=assistant"
